"""What others recorded or wrote, and isn't in this repository: where it is looked for, and who has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DATA = Path(os.environ.get("KVASIR_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
SOURCES = {
    "prompts-mtbench": "a clone of github.com/lm-sys/FastChat",
    "structured-json-schema-test-suite": "a clone of github.com/json-schema-org/JSON-Schema-Test-Suite",
    "structured-jsonschemabench/share": "maskbench/data of github.com/guidance-ai/jsonschemabench",
    "tools-bfcl/questions": "berkeley-function-call-leaderboard/bfcl_eval/data of github.com/ShishirPatil/gorilla",
}
"""Folder of DATA -> what it is."""
TRACES = (
    "Mooncake's are in FAST25-release/traces of github.com/kvcache-ai/Mooncake, agents' sessions in traces of "
    "github.com/callanjfox/kv-cache-tester, Azure's in data of github.com/Azure/AzurePublicDataset"
)


def recorded(folder: str, data: Path = DATA) -> Path:
    """One of SOURCES. Ends the script where it isn't."""
    if not (data / folder).exists():
        sys.exit(f"{data / folder} is missing: it is {SOURCES[folder]} (KVASIR_DATA names a folder instead of {data})")
    return data / folder
