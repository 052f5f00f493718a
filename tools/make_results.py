"""Make docs/results: every table from a run of this command, with its JSON beside it.

    make results                                 # Meta-World, collected here: anyone can make these pages
    make results DATA_ROOT=path/to/datasets      # and the data sets of results/places.py found below that folder
    make results ONLY="bench pages" DATA_ROOT=... # some stages

Stages, in this order; `--only` chooses some:

    closed-form   docs/results: closed-form tokenizers, one second of control a chunk
    train         the learned tokenizers of results/jobs.py, by `actok fit`
    bench         all tokenizers at chunks of 20 steps
    pages         docs/results/learned, from what was trained and measured

Resumable: what an earlier run of the same code measured on the same data is reused, a trained tokenizer is kept while what
was asked for is the same, and a stopped training goes on. Work files go to runs/results.

`--only calibrate` times the jobs on this machine and stores their steps in results/steps.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results.closed_form import make_pages
from results.jobs import job_names
from results.learned import write_learned_pages
from results.measuring import measure_all
from results.places import EPISODES, METAWORLD, SEED, Places
from results.training import calibrate, train

from actok.cli.simulate import collect_into
from actok.core import ActokError

STAGES = ("closed-form", "train", "bench", "pages")


def main() -> int:
    """Run the stages. Returns 1 where a job or a measurement failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="JOB", help="train (or calibrate) only these jobs")
    parser.add_argument("--data-root", type=Path, help="folder with the data sets; those missing are skipped")
    parser.add_argument("--only", nargs="+", choices=(*STAGES, "calibrate"), default=STAGES, metavar="STAGE")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time (default: 2)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of all training steps, to try the command; kept apart"
    )
    args = parser.parse_args()

    places = Places(data_root=args.data_root, scale=args.scale)
    names = job_names(args.names)
    if not (places.work / METAWORLD).exists():
        collect_into(str(places.work / METAWORLD), METAWORLD, "all", EPISODES, seed=SEED, workers=args.jobs)
    failed: list[str] = []
    if "calibrate" in args.only:
        calibrate(names, places, jobs=args.jobs)
    if "closed-form" in args.only:
        make_pages(places)
    if "train" in args.only:
        failed += train(names, places, jobs=args.jobs)
    if "bench" in args.only:
        failed += measure_all(places, jobs=args.jobs)
    if "pages" in args.only:
        write_learned_pages(places)
    if failed:
        print(f"failed, the same command tries again: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ActokError as error:
        sys.exit(f"make_results: {error}")
    except KeyboardInterrupt:
        print("make_results: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
