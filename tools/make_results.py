"""Make docs/results: every table from a run of this command, with its JSON beside it.

    make results                                 # Meta-World, collected here: anyone can make these pages
    make results DATA_ROOT=path/to/datasets      # and the data sets of results/places.py found below that folder
    make results ONLY="bench pages" DATA_ROOT=... # some stages
    make results ONLY=semantic TEACHER=path/to/model DATA_ROOT=... # X-Tokenizer, aligned with that foundation model
    make results ONLY=policies TEACHER=path/to/model               # policies that act through the tokens

Stages, in this order; `--only` chooses some:

    closed-form   docs/results: closed-form tokenizers, one second of control a chunk
    train         the learned tokenizers of results/jobs.py, by `actok fit`
    bench         all tokenizers at chunks of 20 steps
    pages         docs/results/learned, from what was trained and measured
    semantic      docs/results/semantic: X-Tokenizer, in four steps that can be chosen alone as semantic-features,
                  semantic-train, semantic-bench, semantic-pages (results/xtokenizer.py); needs --teacher
    policies      docs/results/policies: demonstrations, tokenizers, policies, rollouts; in steps that can be chosen alone as
                  policies-data, policies-tokenizers, policies-bench, policies-train, policies-rollout,
                  policies-film, policies-latency, policies-pages (results/policies.py); without --teacher what is aligned is left out

Resumable: what an earlier run of the same code measured on the same data is reused, a trained tokenizer is kept while what
was asked for is the same, and a stopped training goes on. Work files go to runs/results.

`--only calibrate` times the jobs on this machine and stores their steps in results/steps.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from results.closed_form import make_pages
from results.jobs import job_names
from results.learned import write_learned_pages
from results.measuring import measure_all
from results.places import EPISODES, METAWORLD, SEED, Places
from results.policies import POLICY_JOBS, PolicyJob
from results.policies_asked import Studio
from results.policies_make import bench, collect, film, fit_tokenizers, groups, latency, roll_out, train_policies
from results.policies_pages import write_policy_pages
from results.training import calibrate, train
from results.xtokenizer import SEMANTIC_JOBS, SemanticJob, Workshop, extract_features, make_arms, train_semantic
from results.xtokenizer_images import IMAGE_JOBS, features_that_see, judge_images, train_images
from results.xtokenizer_measure import measure_semantic
from results.xtokenizer_pages import write_semantic_pages

from actok.cli.simulate import collect_into
from actok.core import ActokError

STAGES = ("closed-form", "train", "bench", "pages", "semantic", "policies")
SEMANTIC = ("semantic-features", "semantic-train", "semantic-bench", "semantic-pages")
STEPS = ("data", "tokenizers", "bench", "train", "rollout", "film", "latency", "pages")
POLICY_STAGES = tuple(f"policies-{step}" for step in STEPS)


def main() -> int:
    """Run the stages. Returns 1 where a job or a measurement failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="JOB", help="features, training, calibration of these jobs only")
    parser.add_argument("--data-root", type=Path, help="folder with the data sets; those missing are skipped")
    parser.add_argument("--teacher", help="Hub id or folder of the foundation model that features are made with")
    stages = (*STAGES, *SEMANTIC, *POLICY_STAGES, "calibrate")
    parser.add_argument("--only", nargs="+", choices=stages, default=STAGES, metavar="STAGE")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time (default: 2)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of all training steps, to try the command; kept apart"
    )
    args = parser.parse_args()

    places = Places(data_root=args.data_root, scale=args.scale)
    known = {**SEMANTIC_JOBS, **IMAGE_JOBS}
    semantic = {name: job for name, job in known.items() if not args.names or name in args.names}
    policies = {name: job for name, job in POLICY_JOBS.items() if not args.names or name in args.names}
    others = [name for name in args.names if name not in known and name not in POLICY_JOBS]
    names = job_names(others) if others or not args.names else []
    if not (places.work / METAWORLD).exists() and {*args.only} - {"policies", *POLICY_STAGES}:
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
    steps = SEMANTIC if "semantic" in args.only else [step for step in SEMANTIC if step in args.only]
    if steps and args.teacher is not None:
        failed += _semantic(Workshop(places=places, teacher=args.teacher), steps, semantic, args.jobs)
    elif steps:
        print("semantic: left out, give --teacher")
    chosen = [s for s in STEPS if "policies" in args.only or f"policies-{s}" in args.only]
    if chosen and policies:
        failed += _policies(Studio(places=places, teacher=args.teacher), chosen, policies, args.jobs)
    if failed:
        print(f"failed, the same command tries again: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _semantic(work: Workshop, steps: Sequence[str], chosen: Mapping[str, SemanticJob], jobs: int) -> list[str]:
    """The steps of the semantic stage that are asked for; what failed is named."""
    failed: list[str] = []
    seeing = {name: job for name, job in chosen.items() if name in IMAGE_JOBS}
    chosen = {name: job for name, job in chosen.items() if name not in seeing}
    make_arms(work)
    if "semantic-features" in steps:
        failed += extract_features(work, jobs=jobs, chosen=chosen)
        failed += features_that_see(work, jobs=jobs) if seeing else []
    if "semantic-train" in steps:
        failed += train_semantic(work, jobs=jobs, chosen=chosen)
        failed += train_images(work, jobs=jobs, chosen=seeing) if seeing else []
    if "semantic-bench" in steps:
        failed += measure_semantic(work, jobs=jobs)
        failed += judge_images(work, jobs=jobs)
    if "semantic-pages" in steps:
        write_semantic_pages(work)
    return failed


def _policies(studio: Studio, steps: Sequence[str], chosen: Mapping[str, PolicyJob], jobs: int) -> list[str]:
    """The steps of the policies' stage that are asked for; what failed is named."""
    failed: list[str] = []
    if "data" in steps:
        failed += collect(studio, chosen, jobs=jobs)
    if "tokenizers" in steps:
        failed += fit_tokenizers(studio, chosen, jobs=jobs)
    if "bench" in steps:
        failed += bench(studio, jobs=jobs)
    for part in groups(chosen):
        if "train" in steps:
            failed += train_policies(studio, part, jobs=jobs)
        if "rollout" in steps:
            failed += roll_out(studio, part, jobs=jobs)
        if "pages" in steps:
            write_policy_pages(studio)
    if "film" in steps:
        failed += film(studio, chosen, jobs=jobs)
    if "latency" in steps:
        failed += latency(studio, chosen)
    if "pages" in steps:
        write_policy_pages(studio)
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ActokError as error:
        sys.exit(f"make_results: {error}")
    except KeyboardInterrupt:
        print("make_results: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
