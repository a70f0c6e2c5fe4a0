"""transformers' part of compare.py: `generate`, or with KVASIR_PEER_BATCHING its continuous batching."""

from __future__ import annotations

import os

from peer import main


def load(folder: str, threads: int):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(threads)
    device = os.environ["KVASIR_PEER_DEVICE"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()

    def at_once(prompts: list[list[int]], tokens: int) -> int:
        ids = torch.tensor(prompts, device=device)
        facts = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return int(model.generate(ids, attention_mask=torch.ones_like(ids), **facts)[:, ids.shape[1] :].numel())

    def continuous(prompts: list[list[int]], tokens: int) -> int:
        facts = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        found = model.generate_batch(inputs=prompts, generation_config=GenerationConfig(**facts), progress_bar=False)
        return sum(len(request.generated_tokens) for request in found.values())

    return continuous if os.environ.get("KVASIR_PEER_BATCHING") else at_once


if __name__ == "__main__":
    main(load)
