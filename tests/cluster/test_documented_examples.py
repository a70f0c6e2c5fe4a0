"""Every curl example of Ollama's documentation gets the documented shape of answer, or a refusal by name."""

from __future__ import annotations

from ollama_documents import OllamaDocuments

REFUSED = {
    "suffix": "does not support insert",  # the model of these tests fills no gaps
    "images": "images",
    "think": "no thoughts",  # nor does it think
    "input": "can't embed",  # nor does it embed
    "/api/embeddings": "can't embed",
    "thinking": "no thoughts",
    "image": "image",
}


def test_examples(gateway, data):
    documents = OllamaDocuments(data("api-ollama/docs"), "bytes", REFUSED)
    found = [documents.answered(gateway.url, *request) for request in documents.requests()]
    assert len(found) >= 80
    assert sum(found) >= 45
