"What an import brings, and what it does not"
import builtins,dis,importlib,pkgutil,types
from pathlib import Path
import pytest
import fastkd
from conftest import run

outside = {'fastkd.test_utils', # lessons, tests and the demo
    'fastkd.cli','fastkd.demo', # commands
    'fastkd.targets.files'} # bytes on disk
left_out = {'reduce_loss'} # names that `fastkd.all` leaves to fastai
mods = sorted(o.name for o in pkgutil.walk_packages(fastkd.__path__, 'fastkd.') if not (o.ispkg or '._' in o.name or o.name.endswith('.all')))

def test_losses_need_torch_only(copy):
    run('python', '-c', "import sys,fastkd.losses.all; bad = {'fastai','torchvision'}&set(sys.modules); assert not bad, bad", cwd=copy)

def test_uninstalled_checkout(copy):
    "A checkout on `sys.path` works where no metadata of fastkd can be found"
    run('python', '-c', f'''
import importlib.metadata as m
real = m.distribution
def distribution(name):
    if name=='fastkd': raise m.PackageNotFoundError(name)
    return real(name)
m.distribution = distribution
import fastkd.all,pathlib
assert pathlib.Path(fastkd.__file__).is_relative_to({str(copy)!r}), fastkd.__file__
import fastkd.losses.all,fastkd.core
assert fastkd.core.list_losses() and fastkd.__version__''', cwd=copy)

@pytest.mark.parametrize('mod', mods)
def test_all_has_every_public_name(mod):
    m,everything = importlib.import_module(mod),importlib.import_module('fastkd.all')
    assert m.__all__ and not [o for o in m.__all__ if not hasattr(m, o)]
    if mod in outside: return
    miss = [o for o in m.__all__ if o not in left_out and getattr(everything, o, None) is not getattr(m, o)]
    assert not miss, f'`fastkd.all` lacks {miss} of {mod}: import it in fastkd/all.py (losses: fastkd/losses/all.py)'

@pytest.mark.parametrize('mod', mods)
def test_every_name_is_there(mod):
    "What the functions of a module read is in it: a star import that is missing would show at the first call only"
    m = importlib.import_module(mod)
    src = Path(m.__file__).read_text(encoding='utf-8')
    def reads(code):
        "Global names in `code` and in all that is defined in it"
        names = {o.argval for o in dis.get_instructions(code) if o.opname in ('LOAD_GLOBAL','LOAD_NAME')}
        return names.union(*[reads(o) for o in code.co_consts if isinstance(o, types.CodeType)])
    def inside(code): return set().union(*[reads(o) for o in code.co_consts if isinstance(o, types.CodeType)])
    known = {*vars(m),*vars(builtins),'__class__','__module__','__qualname__','__name__','__firstlineno__','__static_attributes__','__classdict__','__conditional_annotations__'}
    miss = {o for o in inside(compile(src, m.__file__, 'exec'))-known if not any(o in vars(c) for c in vars(m).values() if isinstance(c, type) and c.__module__==mod)}
    assert not miss, f'{mod} reads {sorted(miss)}, which it neither has nor imports'

def test_no_fastai_name_is_shadowed():
    fa = vars(importlib.import_module('fastai.vision.all'))
    public = {o:m for m in mods if m not in outside for o in importlib.import_module(m).__all__}
    bad = {o:m for o,m in public.items() if o in fa and fa[o] is not getattr(importlib.import_module(m), o)}
    assert set(bad)==left_out, f'names of `fastai.vision.all` that fastkd hides: {bad}'
    assert not left_out&set(vars(importlib.import_module('fastkd.all')))
