"""Start-up hook: timm knows the models of t2t-timm as soon as timm.models has been imported.

Runs at every interpreter start, from t2t_timm.pth (or t2t_timm.start, PEP 829, from Python 3.15), so it imports nothing
but sys and os, and leaves one finder on sys.meta_path that waits for timm.models. T2T_TIMM_AUTOLOAD=0 turns it off.

It stands beside the package, not in it: importing a part of t2t_timm imports t2t_timm, and with that timm and torch.
"""
import os
import sys

_TARGET = 'timm.models'


class _RegisterAfterTimm:
    """Finder that finds nothing itself: it lets the others find timm.models and adds a step behind its execution."""

    def find_spec(self, name, path=None, target=None):
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            exec_module = loader.exec_module

            def exec_module_then_register(module):
                loader.exec_module = exec_module
                exec_module(module)
                register()

            loader.exec_module = exec_module_then_register
        return spec


def register():
    """Register the models; if that fails, say why in one warning and let timm go on."""
    try:
        import t2t_timm.models  # noqa: F401
    except Exception as e:
        import warnings
        from importlib import metadata
        needed = [r for r in metadata.requires('t2t-timm') or () if r.startswith('timm')]
        warnings.warn(
            f't2t-timm could not register its models with timm: {type(e).__name__}: {e}. timm works without them. '
            f'It needs {", ".join(needed)}; timm {metadata.version("timm")} is installed. '
            'T2T_TIMM_AUTOLOAD=0 silences this.', RuntimeWarning, stacklevel=2)


def is_off(variable: str) -> bool:
    """Return True if a variable of the environment is set to a word for off."""
    return os.environ.get(variable, '').lower() in ('0', 'false', 'no', 'off')


def install():
    """Wait for timm.models to be imported, unless T2T_TIMM_AUTOLOAD=0."""
    if is_off('T2T_TIMM_AUTOLOAD'):
        return
    if _TARGET in sys.modules:
        register()
    elif not any(type(f) is _RegisterAfterTimm for f in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterTimm())
