"""Damages tiny models at random and opens them, until the time is up.

    python tests/formats/fuzz.py --seconds 60 [--seed 0] [--save fuzz-failure.gguf]

Each run of one seed makes the same files. Exit status 1, with the seed printed and the file saved, where an open ends
in anything but a Checkpoint or a ModelFileError, takes more than two seconds, or memory grows.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from formats.attacks.mutation import mutate
from formats.attacks.raw_gguf import RawGguf
from formats.powerinfer_files import write_pair
from tiny_models import write_tiny

from isotherm.errors import ModelFileError
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.types import QuantType

MAX_OPEN_S = 2.0
MAX_GROWTH_BYTES = 64 << 20
WARM_UP_FILES = 500  # allocators and caches have settled by then


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the others follow")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failure.gguf"))
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        path = Path(folder) / "mutated.gguf"
        end_s = time.monotonic() + options.seconds
        seed = options.seed
        settled_bytes = 0
        while time.monotonic() < end_s:
            rng = random.Random(seed)
            data, header_bytes = rng.choice(corpus)
            data = mutate(data, header_bytes, rng)
            path.write_bytes(data)
            outcome = open_once(path)
            # the peak of this process never falls, so any single greedy open shows in it
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if sum(outcomes.values()) == WARM_UP_FILES:
                settled_bytes = peak_bytes
            if settled_bytes and peak_bytes - settled_bytes > MAX_GROWTH_BYTES:
                outcome = f"FAILED: memory grew by {peak_bytes - settled_bytes} bytes"
            outcomes[outcome] += 1
            if outcome.startswith("FAILED"):
                options.save.write_bytes(data)
                print(f"seed {seed}: {outcome}; the file is {options.save}")
                return 1
            seed += 1
    for outcome, count in outcomes.most_common():
        print(f"{count:8} {outcome}")
    return 0


def make_corpus(folder: Path) -> list[tuple[bytes, int]]:
    """Sound files, each with the bytes of its header."""
    raw = RawGguf()
    corpus = [(raw.build(), len(raw.header()))]
    sizes: dict[str, Any] = {"hidden_size": 32, "head_dim": 8, "ffn_size": 32, "num_layers": 1}
    models = {
        "llama": QuantType.Q8_0,
        "qwen2": QuantType.Q4_0,
        "qwen3moe": QuantType.Q4_1,
        "gemma3": QuantType.F16,
    }
    for family, quant_type in models.items():
        for vocab in ("bpe", "spm"):
            path = write_tiny(folder / "sound.gguf", family, quant_type, vocab=vocab, **sizes)
            data = path.read_bytes()
            corpus.append((data, data.rindex(b"output_norm.weight") + 64))
            # the tables after the vocabulary are where a model is decided
            corpus.append((data, len(data) // 20))
    for family in ("llama", "opt"):
        data = write_pair(folder, family, QuantType.Q4_0, **sizes)[0].read_bytes()
        corpus.append((data, data.rindex(b"output_norm.") + 64))
        corpus.append((data, len(data) // 20))
    return corpus


def open_once(path: Path) -> str:
    """Opens and reads everything; the name of the outcome, with FAILED before it where there is something to mend."""
    start_s = time.monotonic()
    try:
        with open_checkpoint(path) as checkpoint:
            for source in checkpoint.tensors.values():
                source.read()
        outcome = "opened"
    except ModelFileError as error:
        outcome = type(error).__name__
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"FAILED: {type(error).__name__}: {error}"
    took_s = time.monotonic() - start_s
    return outcome if took_s <= MAX_OPEN_S else f"FAILED: took {took_s:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
