"""Ollama's pages about models: tags, ps, show, version; and what this server doesn't do, said in Ollama's way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvasir.cluster.desk import Desk
from kvasir.cluster.filling import filling_tokens
from kvasir.cluster.http_front import read_json, send_json, warning_header
from kvasir.cluster.ollama_api import LATEST, OllamaEmbedding, OllamaGeneration, find_model
from kvasir.cluster.ollama_fields import SHOW
from kvasir.cluster.ollama_reply import timestamp
from kvasir.cluster.ollama_vocabulary import UNTOLD, written_vocabulary
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.served_model import ServedModel
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.info import ModelInfo

VERSION = "0.40.0"
"""Of Ollama's API, as far as clients may rely on it here: several refuse to talk to an older one."""
FOREVER = "2318-01-01T00:00:00Z"
"""When a model that stays loaded expires."""
_ELSEWHERE = "models are chosen when the server starts: kvasir serve MODEL (a folder, a GGUF file or a name on the hub)"
_REFUSED: dict[str, str] = {
    "create": f"creating models isn't supported; {_ELSEWHERE}",
    "pull": f"pulling models isn't supported; {_ELSEWHERE}, which fetches what isn't on disk",
    "push": "pushing models isn't supported; use huggingface-cli upload",
    "copy": "copying models isn't supported; give a model several names with --served-model-name",
    "delete": "deleting models isn't supported; remove the model's files after the server has stopped",
}
_INFO = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}
"""Key of GGUF files, without the architecture in front -> key of config.json."""
_PARAMETERS = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}


class Blobs:
    """HEAD and POST /api/blobs/{digest}: there are none."""

    async def head(self, request: Request) -> Response:
        return Response(status_code=404)

    async def post(self, request: Request) -> Response:
        raise UnsupportedError(f"blobs aren't supported; {_ELSEWHERE}")


class OllamaModels:
    """What the pages say."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def tags(self, request: Request) -> Response:
        entries = [_entry(model, name) for model in self._desk.models for name in model.names]
        return _json({"models": entries})

    async def ps(self, request: Request) -> Response:
        infos = {info.name: info for info in self._desk.directory.models()}
        running = [(model, infos[model.name]) for model in self._desk.models if model.name in infos]
        return _json({"models": [_running(model, info) for model, info in running]})


class Show:
    """POST /api/show, an ASGI application by itself."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, self._max_body_bytes, any_type=True)
        fields, warnings = sort_fields(body, SHOW, {}, {"system": ("",), "template": ("",), "options": ({},)})
        name = fields.get("model") or fields.get("name")
        if not name:
            raise ClientError("model is required", param="model")
        model = find_model(self._desk, name)
        shown = _shown(model, self._desk.info(model))
        if model.tokenizer is not None:
            told = asyncio.to_thread(written_vocabulary, model.tokenizer) if fields.get("verbose") else None
            shown["model_info"] |= UNTOLD if told is None else await told
        await send_json(send, 200, shown, warning_header(warnings))


def ollama_routes(desk: Desk, max_body_bytes: int) -> list[Route]:
    """All of Ollama's routes."""
    models, blobs = OllamaModels(desk), Blobs()

    async def running(request: Request) -> Response:
        return PlainTextResponse("Ollama is running")

    async def show_version(request: Request) -> Response:
        return _json({"version": VERSION})

    async def refuse(request: Request) -> Response:
        raise UnsupportedError(_REFUSED[request.url.path.rpartition("/")[2]])

    endpoints: dict[str, Callable[[Scope, Receive, Send], Awaitable[None]]] = {
        "generate": OllamaGeneration("generate", desk, max_body_bytes),
        "chat": OllamaGeneration("chat", desk, max_body_bytes),
        "embed": OllamaEmbedding(desk, max_body_bytes, legacy=False),
        "embeddings": OllamaEmbedding(desk, max_body_bytes, legacy=True),
        "show": Show(desk, max_body_bytes),
    }
    return [
        Route("/", running, methods=["GET"]),
        *(Route(f"/api/{name}", endpoint, methods=["POST"]) for name, endpoint in endpoints.items()),
        Route("/api/tags", models.tags, methods=["GET"]),
        Route("/api/ps", models.ps, methods=["GET"]),
        Route("/api/version", show_version, methods=["GET"]),
        *(Route(f"/api/{name}", refuse, methods=["DELETE" if name == "delete" else "POST"]) for name in _REFUSED),
        Route("/api/blobs/{digest:path}", blobs.head, methods=["HEAD"]),
        Route("/api/blobs/{digest:path}", blobs.post, methods=["POST"]),
    ]


def _entry(model: ServedModel, name: str) -> dict[str, Any]:
    card, tagged = model.card, _tagged(name)
    facts = {"size": card.size, "digest": card.digest, "details": _details(model)}
    return {"name": tagged, "model": tagged, "modified_at": timestamp(card.modified), **facts}


def _running(model: ServedModel, info: ModelInfo) -> dict[str, Any]:
    entry = _entry(model, model.name)
    del entry["modified_at"]
    on_device = 0 if info.device in ("", "cpu") else model.card.size
    return {**entry, "expires_at": FOREVER, "size_vram": on_device, "context_length": info.max_model_len}


def _shown(model: ServedModel, info: ModelInfo) -> dict[str, Any]:
    parameters, template, license_ = _parameters(model), _template(model), model.card.license
    quoted = [("TEMPLATE", template), ("LICENSE", license_)]
    lines = [f"FROM {model.name}", *(f"PARAMETER {line}" for line in parameters)]
    lines += [f'{word} """{text}"""' for word, text in quoted if text]
    return {
        "modelfile": "\n".join(lines) + "\n",
        "parameters": "\n".join(parameters),
        "template": template,
        **({"license": license_} if license_ else {}),
        "details": _details(model),
        "model_info": _model_info(model),
        "capabilities": _capabilities(model, info),
        "modified_at": timestamp(model.card.modified),
    }


def _details(model: ServedModel) -> dict[str, Any]:
    card = model.card
    names = {"parent_model": "", "format": card.format, "family": card.family, "families": [card.family]}
    return {**names, "parameter_size": card.parameter_size, "quantization_level": card.precision}


def _model_info(model: ServedModel) -> dict[str, Any]:
    """By the names of GGUF files."""
    card, config = model.card, model.card.config
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    own = {f"{card.family}.{key}": inner[name] for key, name in _INFO.items() if inner.get(name) is not None}
    found = {"general.architecture": card.family, "general.parameter_count": card.parameters, **own}
    if tokenizer := model.tokenizer:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
        found["tokenizer.ggml.eos_token_id"] = tokenizer.eos_token_id
    return {key: value for key, value in found.items() if value is not None}


def _capabilities(model: ServedModel, info: ModelInfo) -> list[str]:
    found = [word for task, word in (("generate", "completion"), ("embed", "embedding")) if task in info.tasks]
    if "generate" in info.tasks:
        found += ["insert"] if filling_tokens(model.tokenizer) else []
        found += ["tools"] if model.shows_tools else []
        found += ["thinking"] if model.thoughts or (model.tools and model.tools.thoughts) else []
    return found


def _parameters(model: ServedModel) -> list[str]:
    """Sampling defaults, as a Modelfile has them."""
    defaults = model.sampling_defaults.items()
    return [f"{_PARAMETERS.get(name, name):<30} {json.dumps(value)}" for name, value in defaults]


def _template(model: ServedModel) -> str:
    return model.tokenizer.templates.sources.get("default", "") if model.tokenizer else ""


def _tagged(name: str) -> str:
    """With :latest where there is no tag."""
    return name if ":" in name.rpartition("/")[2] else name + LATEST


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
