"""Open adapters with damaged files, and count the outcomes:

    python examples/benchmarks/fuzz.py --cases 200000
    python examples/benchmarks/fuzz.py --only 1234        # repeat one case, and print its outcome

Each case takes an intact adapter of a tiny BERT, with packed or coded masks, changes its folder in one way
(`tests/mutations.py`), reads it with `read_adapter`, and opens it with PEFT or transformers; of those that cannot be
read, every fifth. The outcome must be one of the package's own errors, or a model with the logits and labels of the
intact one; PEFT and transformers may fail with errors of their own on what `read_adapter` refuses. Prints the number
of cases by outcome, as a JSON line per kind of change and one for all; exits with an error if there was a fault:
another model, another error, code run, a file written, more than five seconds of computing, or more than twice the
memory of the intact adapter.
"""

import json
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from fuzzing import Fuzzer


def main() -> None:
    """Run, count and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, help="Stop after this time.")
    parser.add_argument("--start", type=int, default=0, help="The number of the first case.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="The number of one case to run; its files are kept.")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        if args.only is not None:
            print(fuzzer.run(args.only))
            print(shutil.copytree(fuzzer.folder, f"fuzzed-{args.only}", dirs_exist_ok=True))
            return
        start, end = time.process_time(), time.monotonic() + 60 * (args.minutes or float("inf"))
        for number in tqdm(range(args.start, args.start + args.cases), unit="case", mininterval=5):
            fuzzer.run(number)
            if time.monotonic() > end:
                break
    kinds: dict[str, Counter[str]] = {}
    for (kind, outcome), count in sorted(fuzzer.outcomes.items()):
        kinds.setdefault(kind, Counter())[outcome] += count
    for kind, outcomes in kinds.items():
        print(json.dumps({"kind": kind, "cases": outcomes.total(), **dict(outcomes.most_common())}))
    total = sum(kinds.values(), Counter[str]())
    seconds = round(time.process_time() - start)
    counts = {"cases": total.total(), "opened_unread": fuzzer.opened_unread, "cpu_seconds": seconds}
    print(json.dumps({**counts, **dict(total.most_common())}))
    for number, fault in fuzzer.faults.items():
        print(json.dumps({"number": number, "fault": fault[:500]}))
    sys.exit(bool(fuzzer.faults))


if __name__ == "__main__":
    main()
