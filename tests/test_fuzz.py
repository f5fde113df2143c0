"Arguments of any type and value, and files of any content: the right answer, or an error that says what is wrong (`benchmarks/faults.py` tries many more)"
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
import fastkd.core,json
# its files go elsewhere
os.environ.setdefault('HYPOTHESIS_STORAGE_DIRECTORY', tempfile.mkdtemp())
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
import numpy as np,pytest
from hypothesis import HealthCheck,assume,given,settings,strategies as st
from test_bad_input import Wrap,state
from test_store import check,make as make_store,quiet
from fastkd.targets.files import digest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore')

said = (ValueError,TypeError,FileNotFoundError)
def told(e):
    "An error of ours: it has a message, in a few lines"
    assert str(e).strip() and len(str(e))<3000, repr(e)

# -- what may come

class Thing: "An object of no use"
def _now(p): return .5
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 12), st.floats(), st.floats(0, 2), st.sampled_from([0,1,-1,.5,1.,4.,2**63,-2**63,2**70,10**400,float('nan'),float('inf'),-float('inf'),5e-324,1e308]),
    st.text(max_size=8), st.sampled_from(['','kd','dkd','mean','none','auto','0','2','cost','error','\0','é'*300,'../x','2:input','-1','fit']), st.binary(max_size=4), st.complex_numbers(),
    st.sampled_from([Decimal('.5'), Fraction(1,2), np.float32(.5), np.int64(2), np.bool_(True), tensor(.5), tensor([.2,.8]), tensor(2), np.array([1.,2.]), np.array([]), pd.Series([1,2]), pd.DataFrame({'a':[1]}), torch.float16, torch.int64,
        Thing, Thing(), _now, len, print, nn.ReLU, nn.ReLU(), KDLoss, KDLoss(), ATLoss(), Path('no_such_folder'), slice(None), ..., range(3), datetime(2020,1,1), torch.device('cpu'), SchedLin(.9,.1), SchedLin(4,1), SchedLin(2,-2), lambda p: None, lambda p: 'x', lambda p: float('nan')]))
anything = st.recursive(scalars, lambda o: st.one_of(st.lists(o, max_size=3), st.tuples(o), st.tuples(o, o), st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 3)), o, max_size=3), st.sets(st.integers(), max_size=2)), max_leaves=4)
def some_of(need=(), **likely):
    "A few of these keywords with likely values; in every second example one of them is anything"
    def pick(ks):
        ks = list(dict.fromkeys([*need,*ks]))
        good = st.fixed_dictionaries({k:likely[k] for k in ks})
        return st.one_of(good, st.tuples(good, st.sampled_from(ks), anything).map(lambda o: {**o[0],o[1]:o[2]}))
    return st.lists(st.sampled_from(list(likely)), min_size=1, max_size=4, unique=True).flatmap(pick)
unit,temps,names = st.floats(0, 1),st.floats(.1, 20),st.sampled_from(list_losses())
weights = st.one_of(st.floats(0, 3), st.sampled_from([SchedLin(.5,1), SchedCos(0,2)]))
layers = st.one_of(st.none(), st.sampled_from(['0','1','2','-1','0.0','0.1:input','',0,1,-1,'layer','0.9',nn.ReLU()]))
pairs = st.sampled_from([('0','0'),('1','1'),('2','2'),('0.1','0.2'),('-1','-1'),('','1'),('0.0:input','0'),(['0','0.1'],['0','0.0']),(['0'],['1']),(nn.ReLU(),'0')])
terms = st.tuples(pairs, some_of(('loss',), loss=names, weight=weights, adapter=st.sampled_from(['auto','none','space','conv','linear','embed',None]), name=st.sampled_from(['a','kd_loss','epoch','']), student=layers, teacher=layers)
    ).map(lambda o: {'student':o[0][0],'teacher':o[0][1],**o[1]})

# -- Learners

def small(path=None):
    set_seed(0, reproducible=True)
    learn = Learner(data(), tiny_cnn((4,)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path or tmp())
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn
@lru_cache(None)
def data():
    "Two batches to train on, one to validate"
    return digits_dls(32, bs=16)
@lru_cache(None)
def net(): set_seed(1); return tiny_cnn((4,8))
@lru_cache(None)
def tmp(): return Path(tempfile.mkdtemp())

def trains(make):
    "Whether the callback that `make()` gives trains; refused in words, and the Learner is as it was, with the steps taken before a schedule left its range"
    learn = small()
    was = state(learn, net())
    try:
        kd = make()
        learn.fit(1, 1e-2, cbs=kd)
        ok = True
    except said as e: told(e); ok = False
    now = state(learn, net())
    for k in was:
        if k not in ('student','training'): assert now[k]==was[k], k
    return ok

# -- properties: each takes an example and says whether it was taken (True) or refused (False)

def callback(kw): return trains(lambda: KnowledgeDistillation(kw.get('teacher', net()), **{k:v for k,v in kw.items() if k!='teacher'}))
callback.examples = some_of(loss=names, T=temps, alpha=unit, task_weight=weights, terms=st.just(()), start=st.one_of(unit, st.integers(0, 2)), stop=st.one_of(unit, st.integers(1, 2)), teacher_weight=st.just(0.),
    pred_kd=st.one_of(st.none(), st.integers(0, 2)), views=st.one_of(st.none(), st.integers(0, 3)), log=st.sampled_from([True,False,'cost','grad','cost,grad']), teacher=st.just(net()))

def term(kw): return trains(lambda: KnowledgeDistillation(net(), terms=Term(**kw)))
term.examples = terms

def teacher(kw): return trains(lambda: KnowledgeDistillation(Teacher(kw.get('model', net()), **{k:v for k,v in kw.items() if k!='model'})))
teacher.examples = some_of(vocab=st.permutations([str(i) for i in range(10)]), stats=st.tuples(st.floats(-1, 1), st.floats(.1, 2)), size=st.integers(1, 20), input_tfm=st.sampled_from([noop,lambda x: x*2]), output=st.one_of(st.none(), st.integers(-1, 1)),
    dtype=st.sampled_from([None,torch.float32,torch.bfloat16,torch.float64]), channels_last=st.booleans(), missing=st.sampled_from(['error','ignore']), model=st.just(net()))

def taps(kw):
    try:
        with Taps(net(), **kw) as t:
            net()(torch.zeros(2,1,8,8))
            assert all(isinstance(o, (Tensor,list)) for o in t.take())
        ok = True
    except said as e: told(e); ok = False
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net().modules())
    return ok
taps.examples = some_of(('layers',), layers=st.one_of(layers, st.lists(st.sampled_from(['0','1','-1','0.0:input','2:output','0.1']), min_size=1, max_size=3), st.text(alphabet='0123.:[]-inputoutx', max_size=10)),
    io=st.sampled_from(['input','output']), call=st.one_of(st.none(), st.integers(-2, 2)), clone=st.sampled_from([None,True,False]))

def precompute(kw):
    path = Path(tempfile.mkdtemp(dir=tmp()))/'s'
    try: s = precompute_targets(kw.get('teacher', net()), data(), path, **{'bar':noop, **{k:v for k,v in kw.items() if k!='teacher'}})
    except said as e:
        told(e)
        # what is there, if anything, is a store that can be gone on with
        if path.exists(): assert not list(path.glob('manifest.json')) or TargetStore(path).verify(bar=quiet)>=0
        return False
    if s.spec['kind']!='sparse' and not kw.get('key') and s.spec['task']!='binary':
        b = data().valid.one_batch()
        keys = item_keys(data().valid, data().path)[:len(b[0])]
        with torch.no_grad(): want = net().eval()(b[0]).as_subclass(Tensor)
        if s.views==1 and not s.replay and kw.get('amp') is None: torch.testing.assert_close(s.get(s.rows(keys)), want, atol=float((want.max()-want.min())/255 if s.spec['kind']=='dense8' else 1e-2), rtol=0)
    assert s.verify(bar=quiet)>0
    shutil.rmtree(path)
    return True
precompute.examples = some_of(kind=st.sampled_from(['dense','dense8','sparse','features']), views=st.one_of(st.none(), st.integers(0, 2)), T=st.one_of(st.none(), temps), k=st.integers(1, 12), tail=st.sampled_from(['sample','bucket']), dtype=st.sampled_from(['float16','float32']), tta=st.integers(0, 1),
    task=st.sampled_from([None,'softmax','binary','regress']), axis=st.one_of(st.none(), st.integers(-3, 3)), key=st.sampled_from([None,lambda o: 'one', lambda o: o]), bs=st.one_of(st.none(), st.integers(0, 700)), amp=st.sampled_from([None,torch.bfloat16,torch.float32]), seed=st.integers(-1, 5), stale_ok=st.booleans(), teacher=st.just(net()))

# -- tensors for losses

dtypes = st.sampled_from([torch.float32]*12+[torch.float16,torch.bfloat16,torch.float64,torch.int64,torch.bool,torch.complex64,torch.uint8])
rows,maps,tokens = st.tuples(st.integers(2, 8), st.integers(2, 6)),st.tuples(st.integers(2, 8), st.integers(2, 4), st.sampled_from([2,4]), st.sampled_from([2,4])),st.tuples(st.integers(2, 4), st.integers(2, 4), st.integers(2, 5))
any_shape = st.lists(st.integers(0, 4), max_size=5).map(tuple)
def shapes_for(nm): return st.one_of(*[maps if fastkd.core._losses[nm].__name__ in fastkd.losses.features.__all__ else st.one_of(rows, maps)]*8, tokens, any_shape)
def fill(shape, dtype, how, seed, scale=1.):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))*scale
    if how and x.numel(): x.view(-1)[seed%x.numel()] = how
    return x.nan_to_num().to(dtype) if dtype in (torch.int64,torch.bool,torch.uint8) else x.to(dtype)
odd = st.sampled_from([0]*8+[float('nan'),float('inf'),-float('inf'),1e4,1e30,-1e38])
labels = st.one_of(*[st.just('fit')]*6, st.sampled_from(['out','float','ignored','column',None]), anything)
def targets(how, shape, seed):
    if not isinstance(how, str) or how not in ('fit','out','float','ignored','column'): return how
    y = torch.randint(0, max(shape[1], 1) if len(shape)>1 else 2, shape[:1]+shape[2:], generator=torch.Generator().manual_seed(seed))
    return {'fit':y, 'out':y+100, 'float':y.float(), 'ignored':torch.full_like(y, -100), 'column':y[:,None] if y.ndim else y}[how]

def loss(ex):
    "Finite for finite features and logits, whatever the shape; else it says what it wants"
    nm,shape,other,dtype,other_dtype,how,scale,y,kw,seed,listy = ex
    a,b = fill(shape, dtype, how, seed, scale).requires_grad_() if dtype.is_floating_point else fill(shape, dtype, how, seed),fill(other or shape, other_dtype or dtype, how if seed%2 else 0, seed+1, scale)
    try:
        l = get_loss(nm, **kw)
        if hasattr(l, 'set_items'): l.set_items(max(len(a) if a.ndim else 2, 2))
        need,args = loss_needs(l),{}
        if 'targ' in need: args['targ'] = targets(y, shape, seed)
        if 'index' in need: args['index'] = torch.arange(len(a)) if a.ndim else y
        v = l([a,a], [b,b], **args) if listy else l(a, b, **args)
        assert isinstance(v, Tensor), type(v)
        if not how and a.requires_grad and v.requires_grad and dtype.itemsize>=4:
            g, = torch.autograd.grad(v.sum(), a, allow_unused=True)
            assert v.isfinite().all() and (g is None or g.isfinite().all()), (v,g)
    except said as e: told(e); return False
    return True
loss.examples = names.flatmap(lambda nm: st.tuples(st.just(nm), shapes_for(nm), st.one_of(*[st.none()]*8, any_shape, rows), dtypes, st.one_of(*[st.none()]*8, dtypes), odd, st.sampled_from([0.,1.,1.,30.,1e3]), labels,
    st.one_of(*[st.just({})]*4, st.dictionaries(st.sampled_from(['T','reduction','axis','ignore_index','mode','alpha','beta','gamma']), st.one_of(temps, st.integers(-3, 3), st.sampled_from(['mean','sum','none','paper','torchdistill']), anything), max_size=2)),
    st.integers(0, 50), st.sampled_from([False]*4+[True])))

# -- stores

in_json = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2, 9), st.floats(), st.text(max_size=6), st.sampled_from([10**30,10**400,'dense','sparse','softmax',[5],[2**40],{'a':[5]},'\ud800','../x','é'*200])),
    lambda o: st.one_of(st.lists(o, max_size=3), st.dictionaries(st.text(max_size=4), o, max_size=3)), max_leaves=5)
@lru_cache(None)
def stored(): return make_store(tmp()/'fuzzed', n=4, views=2, parts=2, vocab=list('abcde'), teacher=dict(name='t', hash='1'))

def manifest(ex):
    "Edited at some place, by somebody who knows how the checksum is made, or does not"
    edits,honest = ex
    s,keys = stored()
    f,m = s.path/'manifest.json',deepcopy(s.manifest)
    for where,what,v in edits:
        d = m['spec'] if where.startswith('spec.') and isinstance(m.get('spec'), dict) else m
        k = where.removeprefix('spec.')
        if what=='drop': d.pop(k, None)
        elif what=='inside' and isinstance(d.get(k), (dict,list)) : d[k] = {**d[k],'x':v} if isinstance(d[k], dict) else [*d[k],v]
        else: d[k] = v
    changed = {k:v for k,v in m.items() if k not in ('made','checksum')}!={k:v for k,v in s.manifest.items() if k not in ('made','checksum')}
    if honest:
        try: m['checksum'] = digest({k:v for k,v in m.items() if k!='checksum'})
        except ValueError: pass
    f.write_bytes(json.dumps(m).encode())
    return _opens(s, keys, changed)
def _opens(s, keys, changed):
    try:
        n = check(s.path, keys, 2)
        assert n in ((None,8) if not changed else (None,)), f'{n} rows of an altered store are taken for right'
    finally: (s.path/'manifest.json').write_text(json.dumps(s.manifest, indent=1))
    return n is not None
manifest.examples = st.tuples(st.lists(st.tuples(st.sampled_from([*'format version views replay stale seed vocab teacher tfms made checksum spec more'.split(), *(f'spec.{k}' for k in 'kind shape task axis T k tail dtype more'.split())]),
    st.sampled_from(['set','set','inside','drop']), in_json), min_size=1, max_size=3), st.booleans())

def manifest_bytes(ex):
    "Any bytes in the place of some of the manifest's"
    s,keys = stored()
    b = json.dumps(s.manifest, indent=1).encode()
    for at,n,new in ex: b = b[:int(at*len(b))]+new+b[int(at*len(b))+n:]
    (s.path/'manifest.json').write_bytes(b)
    try: same = json.loads(b)=={**s.manifest}
    except (ValueError,RecursionError): same = False
    return _opens(s, keys, not same)
manifest_bytes.examples = st.lists(st.tuples(unit, st.integers(0, 20), st.one_of(st.just(b' '), st.binary(max_size=6), st.sampled_from([b'',b'0',b'"',b'{',b'['*50,b'null',b'NaN',b'1e999',b'\xff',b'\\u0000']))), min_size=1, max_size=3)

# -- what was found by many examples

@pytest.mark.parametrize('f,ex', [(callback,dict(T=1e300)), (callback,dict(T=5e-324)), (callback,dict(T=tensor([.2,.8]))), (callback,dict(T=True)), (teacher,dict(stats=(set(),1.))), (teacher,dict(stats=(0.,0.))), (precompute,dict(axis=2)), (precompute,dict(bs=0)),
    (loss,('kd',(3,2),None,torch.float32,torch.int64,0,1.,'fit',{},0,False)), (loss,('rkl',(2,2),None,torch.complex64,None,0,1.,'fit',{},0,False)), (loss,('bkd',(2,2),None,torch.bool,None,0,1.,'fit',{},0,False)), (loss,('dist',(2,2),None,torch.float32,torch.int64,0,1.,'fit',{},0,False))],
    ids=lambda o: getattr(o, '__name__', str(o)))
def test_found(f, ex): assert f(ex) is False

def test_born_again():
    "A Learner can be called, but makes no students"
    with pytest.raises(TypeError, match='`make_student` is a function'): born_again(small(), net(), 1, 1)

# -- the gate tries a few of each, always the same

properties = dict(callback=(callback,60), term=(term,60), teacher=(teacher,60), taps=(taps,150), precompute=(precompute,25), loss=(loss,400), manifest=(manifest,200), manifest_bytes=(manifest_bytes,100))
def trial(f, n, derandomize=True, failed=None):
    "What became of `n` examples: {True: taken, False: refused}; with a list `failed`, what went wrong is noted there, and the next one is tried"
    res = Counter()
    @settings(max_examples=n, derandomize=derandomize, database=None, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @given(f.examples)
    def run(ex):
        try: res[f(ex)] += 1
        except Exception as e:
            if failed is None: raise
            res['failed'] += 1
            failed.append((ex,e))
    run()
    return res

@pytest.mark.parametrize('nm', properties)
def test_any(nm):
    f,n = properties[nm]
    res = trial(f, n)
    # neither is all refused, nor all taken
    assert res[True]>=n/50 and res[False]>n/20, res
