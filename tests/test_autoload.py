"""Registration without an import: the start-up hook, its switch, and what happens when it cannot work.

Each case is a process of its own, with the package installed (wheel or editable) as a user has it. Those of `forked`
come from one process that was started with the hook off and has imported torch, most of what timm's import costs.
"""
import os
import runpy
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import timm
import torch

import _t2t_timm_autoload

COUNT = "import timm; print(len(timm.list_models(['t2t_vit*', 'test_t2t_vit'])))"
NUM_MODELS = '17'
ORDERS = (
    'import t2t_timm, timm', 'import timm.models, t2t_timm', 'import timm.layers', 'from t2t_timm.models import T2TViT',
    'from t2t_timm.layers import ConvTokens', 'from t2t_timm.weights.fit import looks_like')
ON = '''import os
del os.environ['T2T_TIMM_AUTOLOAD']
import _t2t_timm_autoload; _t2t_timm_autoload.install()  # as t2t_timm.pth has it
'''
FORKED = {
    **{order: f'{ON}{order}\n{COUNT}' for order in ORDERS},
    'modules': f"{ON}import sys, timm; print(*(m for m in sys.modules if m.startswith('t2t_timm.')))",
    'off': f'{COUNT}\nimport t2t_timm\n{COUNT}',
    "timm's own": '''if True:
        import logging
        logging.basicConfig(level=logging.DEBUG)
        import timm
        import torch
        @timm.models.register_model
        def t2t_vit_14(pretrained=False, **kwargs):
            return torch.nn.Identity()
        import t2t_timm
        print(type(timm.create_model('t2t_vit_14')).__name__, len(timm.list_models('t2t_vit*')))''',
    'runner': '''if True:
        import runpy, sys  # as `python -m t2t_timm scripts/script.py --flag x` does
        sys.argv = ['', 'scripts/script.py', '--flag', 'x']
        runpy.run_module('t2t_timm', run_name='__main__', alter_sys=True)''',
    'loaded': '''if True:
        import sys
        import torch
        assert not {'timm', 't2t_timm'} & set(sys.modules)
        model, images, expected = torch.load('model.pt', weights_only=False)
        torch.testing.assert_close(model(images), expected)
        import timm
        print(type(model).__name__, timm.is_model('t2t_vit_14'))''',
    'broken': ON + '''if True:
        import importlib.metadata
        import sys
        sys.modules['t2t_timm.layers'] = None  # as if a symbol of a newer timm were missing
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: '0.9.16' if name == 'timm' else version(name)
        import timm
        import timm.models
        print(len(timm.list_models()) > 1000, len(timm.list_models('t2t*')))''',
}
FORK = '''
    import multiprocessing, os, subprocess, sys
    import torch, torchvision

    def run(code):
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        exec(code, {'__name__': '__main__'})

    for i, code in enumerate(sys.argv[1:]):
        with open(f'{i}.out', 'w') as out, open(f'{i}.err', 'w') as err:
            if not hasattr(os, 'fork'):
                subprocess.run([sys.executable, '-c', code], stdout=out, stderr=err)
            else:
                child = multiprocessing.get_context('fork').Process(target=run, args=(code,))
                child.start()
                child.join()
'''


def run_python(folder, code, *args, options=('-c',), autoload=None):
    """Run Python code in a fresh process and return its output; T2T_TIMM_AUTOLOAD as given."""
    unset = ('T2T_TIMM_AUTOLOAD', 'PYTHONPATH', 'PYTHONWARNINGS')  # a warning is looked for
    env = {k: v for k, v in os.environ.items() if k not in unset}
    if autoload is not None:
        env['T2T_TIMM_AUTOLOAD'] = autoload
    return subprocess.run(
        [sys.executable, *options, textwrap.dedent(code), *args], env=env, cwd=folder, check=True, text=True,
        capture_output=True)


@pytest.fixture
def run(tmp_path):
    """run_python in a folder of its own."""
    return partial(run_python, tmp_path)


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
    """(stdout, stderr) of FORKED, by name."""
    folder = tmp_path_factory.mktemp('forked')
    model, images = timm.create_model('test_t2t_vit', depth=1).eval(), torch.randn(1, 3, 56, 56)
    torch.save((model, images, model(images).detach()), folder / 'model.pt')
    (folder / 'scripts').mkdir()
    (folder / 'scripts' / 'helper.py').write_text('VALUE = 5')
    (folder / 'scripts' / 'script.py').write_text(
        'import sys, helper, timm\nprint(sys.argv[1:], helper.VALUE, len(timm.list_models("t2t*")), __name__)')
    run_python(folder, FORK, *FORKED.values(), autoload='0')
    return {
        name: [(folder / f'{i}.{end}').read_text() for end in ('out', 'err')] for i, name in enumerate(FORKED)}


def test_a_script_that_imports_only_timm(run):
    assert run(COUNT).stdout.split() == [NUM_MODELS]


def test_switched_off_and_still_importable(forked):
    assert forked['off'][0].split() == ['0', NUM_MODELS]


@pytest.mark.parametrize('value, expected', [('0', 0), ('False', 0), ('no', 0), ('1', 1), ('', 1)])
def test_values_of_the_switch(monkeypatch, value, expected):
    calls = []
    monkeypatch.setattr(_t2t_timm_autoload, 'register', lambda: calls.append(1))
    monkeypatch.setenv('T2T_TIMM_AUTOLOAD', value)
    _t2t_timm_autoload.install()  # timm.models has been imported
    assert len(calls) == expected


def test_a_whole_model_is_loaded_where_nothing_was_imported(forked):
    """As a worker gets it that is handed a model; pickle imports the package, which registers the models."""
    out, err = forked['loaded']
    assert out.split() == ['T2TViT', 'True'], err


@pytest.mark.parametrize('order', ORDERS)
def test_any_order_of_imports_without_a_warning(forked, order):
    out, err = forked[order]
    assert out.split() == [NUM_MODELS] and 'Overwriting' not in err and 'Warning' not in err


def test_start_up_imports_nothing_heavy(run):
    out = run('''
        import sys
        print(*[m for m in ('torch', 'timm', 't2t_timm', 'yaml', 'importlib.util') if m in sys.modules])
        print('_t2t_timm_autoload' in sys.modules)
    ''')
    heavy, hook = out.stdout.split('\n')[:2]
    assert hook == 'True' and not set(heavy.split()) & {'torch', 'timm', 't2t_timm', 'yaml'}


def test_timm_gets_only_what_models_need(forked):
    rooms = {name.split('.')[1] for name in forked['modules'][0].split()}
    assert {'models', 'weights', 'layers'} <= rooms and not rooms & {'hub', 'commands', 'cli', 'recipes', 'digits'}


def test_spawned_processes(run, tmp_path):
    script = tmp_path / 'spawn.py'
    script.write_text(textwrap.dedent('''
        import multiprocessing

        def count(_):
            import timm
            return len(timm.list_models('t2t_vit*'))

        if __name__ == '__main__':
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                print(pool.map(count, [0]))
    '''))
    assert run(str(script), options=()).stdout.split() == ['[16]']


def test_module_runner(forked, monkeypatch):
    out, _ = forked['runner']
    assert out.split('\n')[0] == "['--flag', 'x'] 5 16 __main__"
    monkeypatch.setattr(sys, 'argv', ['t2t_timm', 'no.py'])
    with pytest.raises(SystemExit, match='no script at no.py'):  # which Python prints, and exits with 1
        runpy.run_module('t2t_timm', run_name='__main__')


def test_a_package_that_cannot_import_costs_one_warning_that_names_versions(forked):
    out, err = forked['broken']
    assert out.split() == ['True', '0']
    assert err.count('t2t-timm could not register its models with timm') == 1
    assert 'It needs timm>=' in err and 'timm 0.9.16 is installed' in err


def test_a_model_that_timm_has_itself_is_left_alone(forked):
    out, err = forked["timm's own"]
    assert out.strip() == 'Identity 16'
    assert err.count('timm has its own t2t_vit_14') == 1 and 'Overwriting' not in err
