"""Offscreen images of a MuJoCo model, fast enough for recording: no shadows, no multisampling."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actok.core.errors import ActokError

__all__ = ["Cameras", "choose_backend"]


def choose_backend() -> None:
    """Before MuJoCo is first imported: on a Linux machine without a display, render with EGL unless told otherwise."""
    if sys.platform == "linux" and "mujoco" not in sys.modules and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


class Cameras:
    """Named cameras of one model. `views` are camera names; those in `upside_down` are turned by 180 degrees."""

    def __init__(self, model: Any, views: Sequence[str], size: int, upside_down: Sequence[str] = ()) -> None:
        import mujoco

        # Shadows and multisampling cost six to ten times the rest of the picture on a software renderer.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # each OpenGL backend raises its own kind
            raise ActokError(
                f"images need an offscreen OpenGL, which failed ({type(error).__name__}: {error}); install libegl1 and"
                " set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa, or make the environment without views"
            ) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._views, self._upside_down = tuple(views), frozenset(upside_down)

    def images(self, data: Any) -> Mapping[str, np.ndarray]:
        """View name -> uint8 [size, size, 3] of the current state."""
        found = {}
        for view in self._views:
            self._renderer.update_scene(data, camera=view)
            image = self._renderer.render()
            found[view] = np.ascontiguousarray(image[::-1, ::-1]) if view in self._upside_down else image.copy()
        return found

    def close(self) -> None:
        """Free the OpenGL context."""
        self._renderer.close()
