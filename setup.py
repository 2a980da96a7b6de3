"""Everything is in pyproject.toml but one step: compiling base/kernels/csrc where that works."""

import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent / "base" / "kernels"


class BuildKernels(build_py):
    """Copy the packages, then build the C library beside them. It is optional: never fails."""

    def run(self) -> None:
        super().run()
        # Run as a script: importing the package would need torch, which a build does not have.
        build = runpy.run_path(str(HERE / "build.py"))["build"]
        target = HERE if self.editable_mode else Path(self.build_lib) / "base" / "kernels"
        self.announce(f"native kernels: {build(target) or 'not built, see _native.txt'}", 2)


class PlatformDistribution(Distribution):
    """A wheel with a compiled library belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels}, distclass=PlatformDistribution)
