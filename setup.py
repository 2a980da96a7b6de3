"""Everything is in pyproject.toml but one step: compiling what is in C where that works."""

import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildNative(build_py):
    """Copy the packages, then build the C libraries in them. They are optional: never fails."""

    def run(self) -> None:
        super().run()
        # Run as a script: importing the package would need torch, which a build does not have.
        build = runpy.run_path(str(HERE / "base" / "kernels" / "build.py"))
        target = HERE if self.editable_mode else Path(self.build_lib)
        kernels = build["build"](target / "base" / "kernels")
        net = target / "service" / "net" / "_net.so"
        accepting = build["build_library"](net, HERE / "service" / "net" / "csrc")
        self.announce(f"native kernels: {kernels or 'not built, see _native.txt'}", 2)
        self.announce(f"accept filter: {accepting or 'not built, see _net.txt'}", 2)


class PlatformDistribution(Distribution):
    """A wheel with a compiled library belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildNative}, distclass=PlatformDistribution)
