"""Puts the compiled kernels into a wheel: a library for each instruction set of the machine that builds it.

Without a C compiler, or with KNN_SSD_WHEEL_KERNELS=off, the wheel is pure Python: the kernels are then compiled at
first use where there is a compiler. Editable installs compile at first use, too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the kernels before the files of a wheel are collected."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the libraries to the wheel, which is then one for this platform; `version` is the kind of build."""
        compiler = shlex.split(os.environ.get("CC", "cc"))
        wanted = os.environ.get("KNN_SSD_WHEEL_KERNELS", "on") != "off"
        if version == "editable" or not wanted or shutil.which(compiler[0]) is None:
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from knn_ssd.kernels import build

        for name in build.own_instruction_sets():
            try:
                library = build.compile_for_wheel(compiler, self._folder, name)
            except build.KernelsUnavailable as error:
                self.app.display_warning(f"the wheel has no kernels for {name}: {error}")
                continue
            build_data["force_include"][str(library)] = f"knn_ssd/kernels/lib/{library.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{self._platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the libraries, which are in the wheel now."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return Path(self.directory) / ".kernels"

    @property
    def _platform(self) -> str:
        """The tag of this machine: `linux_…`, which auditwheel replaces by the `manylinux` that the libraries need."""
        tag: str = self.build_config.builder.get_best_matching_tag()  # with the interpreter and the ABI before it
        return tag.rpartition("-")[2]
