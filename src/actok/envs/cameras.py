"""Offscreen images of a MuJoCo model, fast enough for recording: no shadows, no multisampling."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actok.core.errors import ActokError, ConfigError

NO_OPENGL = (
    "images need an offscreen OpenGL, which failed ({}: {}); install libegl1, libegl-mesa0 and libgl1-mesa-dri and set"
    " MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa, or make the environment without views"
)
# What MuJoCo takes for MUJOCO_GL: the libraries of each platform, and words for its default and for none.
LIBRARIES = {"linux": ("egl", "osmesa", "glfw", "glx"), "win32": ("wgl", "glfw"), "darwin": ("cgl", "glfw")}
SWITCHES = ("", "enable", "enabled", "on", "true", "1", "disable", "disabled", "off", "false", "0")

__all__ = ["Cameras", "check_variable", "check_views", "choose_backend"]


def check_views(simulator: str, views: Sequence[str] | str, known: Sequence[str], image_size: int) -> tuple[str, ...]:
    """The views of an environment's constructor as a tuple; where there are any, `choose_backend` was called.

    Raises ConfigError for a view that is not in `known`, for an impossible image size (height and width in pixels), and for
    a MUJOCO_GL with which MuJoCo cannot be imported, views or none.
    """
    check_variable()
    chosen = (views,) if isinstance(views, str) else tuple(views)
    for view in chosen:
        if view not in known:
            raise ConfigError(f"{simulator} has no view {view!r}; it has {', '.join(known)}")
    if not isinstance(image_size, int) or not 16 <= image_size <= 2048:
        raise ConfigError(f"image_size is {image_size!r}; give a whole number of pixels from 16 to 2048")
    if chosen:
        choose_backend()
    return chosen


def check_variable() -> None:
    """Raise ConfigError where MUJOCO_GL has a value that MuJoCo does not know."""
    value = os.environ.get("MUJOCO_GL", "")
    libraries = LIBRARIES.get(sys.platform, ("glfw",))
    if value.lower().strip() not in (*libraries, *SWITCHES):
        raise ConfigError(
            f"MUJOCO_GL is {value!r}, which MuJoCo does not know; set it to {', '.join(libraries)} or disable, or unset it"
        )


def choose_backend() -> None:
    """How MuJoCo renders on a Linux machine without a display, unless MUJOCO_GL says it.

    EGL where its library is installed (it uses a GPU where there is one), else OSMesa, which renders in software. Where
    neither is installed EGL is named, and making the cameras says what to install. MuJoCo reads the variable when it is
    imported; where that has happened (for an environment without views, say), the module that read it is loaded again.
    """
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("MUJOCO_GL"):
        return
    missing = not _loads("libEGL.so.1") and _loads("libOSMesa.so.8", "libOSMesa.so.6")
    os.environ["MUJOCO_GL"] = "osmesa" if missing else "egl"
    read = sys.modules.get("mujoco.gl_context")
    if read is None:
        return
    try:
        importlib.reload(read)
    except Exception as error:  # a library that does not load shows in many ways
        del os.environ["MUJOCO_GL"]
        raise ActokError(NO_OPENGL.format(type(error).__name__, error)) from error


def _loads(*libraries: str) -> bool:
    """Whether one of the shared libraries is installed."""
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


class Cameras:
    """Named cameras of one model. `views` are camera names; those in `upside_down` are turned by 180 degrees. Geoms of
    the groups `hidden` (0 to 5), e.g. those that only collide, are not drawn.
    """

    def __init__(
        self,
        model: Any,
        views: Sequence[str],
        size: int,
        upside_down: Sequence[str] = (),
        hidden: Sequence[int] = (),
    ) -> None:
        import mujoco

        # Shadows and multisampling cost six to ten times the rest of the picture on a software renderer.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # each OpenGL backend raises its own kind
            raise ActokError(NO_OPENGL.format(type(error).__name__, error)) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._option = mujoco.MjvOption()
        for group in hidden:
            self._option.geomgroup[group] = 0
        self._views, self._upside_down = tuple(views), frozenset(upside_down)
        if not _OPEN:
            atexit.unregister(_close_all)
            atexit.register(_close_all)  # after MuJoCo's own function, so that it runs before
        _OPEN.add(self)

    def images(self, data: Any) -> Mapping[str, np.ndarray]:
        """View name -> uint8 [size, size, 3] of the current state."""
        found = {}
        for view in self._views:
            self._renderer.update_scene(data, camera=view, scene_option=self._option)
            image = self._renderer.render()
            found[view] = np.ascontiguousarray(image[::-1, ::-1]) if view in self._upside_down else image.copy()
        return found

    def close(self) -> None:
        """Free the OpenGL context."""
        _OPEN.discard(self)
        self._renderer.close()


# MuJoCo ends EGL when the interpreter leaves; a context that is freed later complains at length.
_OPEN: weakref.WeakSet[Cameras] = weakref.WeakSet()


def _close_all() -> None:
    for cameras in list(_OPEN):
        cameras.close()
