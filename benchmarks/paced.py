"""A stand-in for vLLM as a process: each stream gets a token every so many milliseconds, as from a GPU that nothing here has to wait for.

    python -m benchmarks.paced --step-ms 20

It is the tests' double of vLLM's protocol, and computes no model. Prints its URL, and runs until its standard input is closed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from claas.core.settings import load_settings
from claas.models.default_model import default_model
from tests.doubles.vllm_script import Asked, Said
from tests.doubles.vllm_server import VllmDouble

LONGEST = 128
CONTEXT = 8192


def say_much(_: Asked) -> Said:
    return Said("word " * LONGEST)


@contextmanager
def running_paced(model_dir: Path, step_ms: float) -> Iterator[str]:
    """The URL of one in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.paced", "--step-ms", str(step_ms), "--base-model", str(model_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the stand-in did not start"
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, required=True)
    parser.add_argument("--base-model", type=Path, help="folder of the model whose tokenizer it has; default: the embedded one")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base_model or default_model(load_settings().cache_dir))
    with VllmDouble(tokenizer, script=say_much, step_s=args.step_ms / 1000, max_model_len=CONTEXT, max_num_seqs=256) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
