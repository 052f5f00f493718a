"""actok teacher"""

from __future__ import annotations

import argparse

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Train a small vision-language teacher and say what it is worth."""
    from actok.alignment.scene import SceneConfig
    from actok.training.teacher import TeacherTraining, train_teacher

    given = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    report = train_teacher(
        list(args.data),
        args.out,
        training=TeacherTraining(**{name: value for name, value in given.items() if value is not None}),
        config=SceneConfig() if args.size is None else SceneConfig(image_size=args.size),
        views=None if args.views is None else [name.strip() for name in args.views.split(",")],
    )
    every = "" if report.stride == 1 else f" (one of every {report.stride})"
    print(
        f"trained on {report.images} images of {report.frames} frames{every} of {report.episodes} episodes with"
        f" {report.texts} texts in {report.seconds:.0f} s; loss {report.loss:.3f}"
    )
    print(report.held_out or "nothing was held out: too few episodes, so nothing is known about new ones")
    print(f"saved in {report.folder}; use it with: actok features --data DATA --teacher {args.out} --out DIR")
    return 0
