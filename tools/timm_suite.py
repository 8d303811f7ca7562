"""pytest plugin: timm's own tests over this package's models (python -m pytest -p tools.timm_suite tests_of_timm).

timm's test modules call `list_models` as they are imported. The plugin answers with our names alone, and treats them as
if they stood in timm's lists of plain ViTs (NON_STD_FILTERS) and of models with forward_intermediates
(FEAT_INTER_FILTERS). No test is edited; tests that name timm's own models are not selected.
"""
import fnmatch

import pytest
import timm
import timm.models

OURS = ('t2t_vit*', 'test_t2t_vit*')
MODULES = ('t2t_vit', 't2t_vit_dense')
PLAIN_VIT = 'vit_*'  # an entry of NON_STD_FILTERS by which that list is recognised

_list_models = timm.list_models


def _as_list(value):
    return [value] if isinstance(value, str) else list(value)


def _list_ours(filter='', module='', exclude_filters='', **kwargs):
    if PLAIN_VIT in _as_list(exclude_filters):  # asks for models that are not plain ViTs
        return []
    if filter and PLAIN_VIT not in _as_list(filter):
        names = _list_models(filter=filter, module=module, exclude_filters=exclude_filters, **kwargs)
    else:
        names = _list_models(filter=list(OURS), exclude_filters=exclude_filters, **kwargs)
        if module and not isinstance(module, str):  # FEAT_INTER_FILTERS
            names = [n for n in names if timm.models.model_entrypoint(n.split('.')[0]).__module__.split('.')[-1] in MODULES]
    return [n for n in names if any(fnmatch.fnmatch(n, o) for o in OURS)]


timm.list_models = timm.models.list_models = _list_ours
timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kwargs: _list_ours(*args, pretrained=True, **kwargs)


def pytest_collection_modifyitems(config, items):
    """Keep the tests that take one of our models; skip, with the reason, those that need the network."""
    kept, dropped = [], []
    for item in items:
        name = getattr(item, 'callspec', None) and item.callspec.params.get('model_name')
        ours = isinstance(name, str) and any(fnmatch.fnmatch(name, o) for o in OURS)
        (kept if ours else dropped).append(item)
        if ours and 'pretrained' in item.originalname and not name.startswith('test_t2t_vit'):
            item.add_marker(pytest.mark.skip(reason='needs weights from the Hub; this run has no network'))
        elif ours and item.originalname == 'test_model_inference':
            item.add_marker(pytest.mark.skip(reason="reads reference tensors from timm's own Hub repos"))
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
