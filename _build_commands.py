"""Build commands that put the start-up files beside the package in site-packages, in wheels and editable installs."""
import os

from setuptools.command.build_py import build_py as _build_py
from setuptools.command.editable_wheel import editable_wheel as _editable_wheel

START_FILES = ('t2t_timm.pth', 't2t_timm.start')


class build_py(_build_py):
    """build_py that also copies the start-up files."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in START_FILES:
                self.copy_file(name, os.path.join(self.build_lib, name))

    def get_outputs(self, include_bytecode=1):
        return super().get_outputs(include_bytecode) + [os.path.join(self.build_lib, name) for name in START_FILES]


class editable_wheel(_editable_wheel):
    """editable_wheel that also packs the start-up files, which are not part of any package."""

    def _select_strategy(self, *args, **kwargs):
        strategy = super()._select_strategy(*args, **kwargs)

        class WithStartFiles(type(strategy)):
            def __call__(self, wheel, files, mapping):
                super().__call__(wheel, files, mapping)
                for name in START_FILES:
                    wheel.write(name, name)

        strategy.__class__ = WithStartFiles
        return strategy
