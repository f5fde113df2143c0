"""What happens when something goes wrong, tried many times: trials and failures.

    python benchmarks/faults.py                            # all parts, about twenty minutes on two cores; needs `pip install -e '.[dev]'`
    python benchmarks/faults.py --parts flips,fuzz         # some of them; the others stay in the file as they are
    python benchmarks/faults.py --trials 10000             # more of those that are drawn at random

`kills`: processes that write a store are killed (SIGKILL) at random moments, one or several at a time, until it is complete; it is then compared with one that was written undisturbed.
`flips`: single bits of every file of a store, of each kind, as a folder and packed. `cuts`: files cut short, made longer, emptied, deleted. What is read afterwards must be right, or refused.
`processes`: two processes of which one raises, dies, is another one than it should be, or does not come. `events`: a callback that raises at each event of a fit; the Learner is then as it was, and
trains as if nothing had happened. `fuzz`: arguments, files and tensors of any type and value (hypothesis), which are taken, or refused by an error that says why.

The parts use what the tests use (tests/test_store.py, _ddp.py, test_processes.py, test_bad_input.py, test_fuzz.py). Each row of faults.json has the number of trials and of failures."""
from fastai.vision.all import *
from fastai.callback.training import GradientAccumulation
from fastcore.script import call_parse
from functools import lru_cache
import inspect,itertools,json,signal,warnings
from fastkd.all import *
from fastkd.test_utils import *

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here),str(here.parent/'tests')]

# -- an exception at every event
order = KnowledgeDistillation.order
cancels = {k:globals()[f'Cancel{k}Exception'] for k in ('Step','Backward','Batch','Train','Valid','Epoch','Fit')}
exceptions = [RuntimeError,MemoryError,KeyboardInterrupt,SystemExit,*cancels.values()]
events = [*'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate after_validate after_epoch after_fit'.split(),
    *(f'{o} (validation)' for o in ('before_batch','after_pred','after_loss','after_batch')), *(f'after_cancel_{o}' for o in ('backward','step','batch','train','validate','epoch','fit'))]

class Raises(Callback):
    "Raise `ex` at `event`, before `KnowledgeDistillation` acts or after it: the second time, if there is one"
    def __init__(self, event, ex, first):
        self.order,self.ex,self.n = order+(-.5 if first else .5),ex,0
        nm,*valid = event.split(' ')
        def _raise():
            if bool(valid)!=(not self.learn.training) and nm in _in_batch: return
            self.n += 1
            if self.n==(1 if nm.endswith('_fit') or nm.startswith('after_cancel') else 2): raise self.ex('raised on purpose')
        setattr(self, nm, _raise)
        # what a cancellation is told by
        if nm.startswith('after_cancel_'): self._cancels(nm[13:])
    def _cancels(self, what):
        at = dict(validate='before_validate', epoch='before_train', fit='before_epoch', train='before_batch', batch='after_pred', step='before_step', backward='before_backward')[what]
        def _cancel():
            if self.learn.training or what in ('validate','epoch','fit'): raise cancels[dict(validate='Valid').get(what, what.title())]()
        setattr(self, at, _cancel)
_in_batch = ('before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch')

class Setting:
    "A way to use the callback: what `make(net, path)` returns, with other callbacks, passed to each fit or attached to the Learner"
    def __init__(self, make, more=list, attached=False, same=True): self.make,self.more,self.attached,self.same = make,more,attached,same
KD = partial(KnowledgeDistillation, T=4.)
settings = {
    'a teacher': Setting(lambda t,d: KD(t)),
    'attached to the Learner': Setting(lambda t,d: KD(t), attached=True),
    'two terms, one with an adapter': Setting(lambda t,d: KD(t, terms=[Term('at', '1', '1'),Term('hint', '0', '1')]), same=False),
    'the same, attached': Setting(lambda t,d: KD(t, terms=[Term('at', '1', '1'),Term('hint', '0', '1')]), attached=True, same=False),
    'a store': Setting(lambda t,d: KD(TargetStore(d/'store'))),
    'the batches carry the answers': Setting(lambda t,d: KD()),
    'an ensemble': Setting(lambda t,d: KD([t,tiny_cnn((4,))]), same=False),
    'a teacher that learns': Setting(lambda t,d: KD(deepcopy(t), teacher_weight=1.), same=False),
    'the average of the student': Setting(lambda t,d: KD(EMATeacher(.9)), same=False),
    'MixUp': Setting(lambda t,d: KD(t), more=lambda: [MixUp()]),
    'schedules, columns of cost and gradient': Setting(lambda t,d: KnowledgeDistillation(t, alpha=SchedLin(.9,.1), T=SchedLin(8,1), start=.1, log='cost,grad')),
    'gradient accumulation': Setting(lambda t,d: KD(t), more=lambda: [GradientAccumulation(32)])}

@lru_cache(None)
def _parts():
    "Data, a teacher, a folder with its stored answers"
    set_seed(0)
    dls,t,d = digits_dls(32, bs=16),tiny_cnn((4,8)),Path(tempfile.mkdtemp())
    precompute_targets(t, dls, d/'store', bar=noop)
    # a few items to validate on
    dls.valid.n = 48
    return dls,t,d

def _learner(nm):
    dls,t,d = _parts()
    if nm=='the batches carry the answers': dls = TargetStore(d/'store').attach(dls)
    set_seed(0, reproducible=True)
    learn = Learner(dls, tiny_cnn((4,8)), metrics=accuracy, path=d/'learner')
    (d/'learner').mkdir(exist_ok=True)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn,t,deepcopy(learn.model.state_dict())

def _as_it_is(learn, *models):
    "All that a fit that failed must leave as it was"
    from test_bad_input import state
    res = {k:v for k,v in state(learn, *models).items() if k not in ('student','training')}
    return {**res, 'requires_grad':[p.requires_grad for m in (learn.model,*models) for p in m.parameters()], 'loaders':[(id(dl),[k for k,v in vars(dl).items() if inspect.ismethod(v) and v.__self__ is not dl]) for dl in learn.dls.loaders], 'lock':learn.lock.locked(), 'opt_func':id(learn.opt_func)}

def _fit(learn, cbs, w):
    "A fit from the same beginning: what the student is afterwards, and the table"
    learn.model.load_state_dict(w)
    learn.model.zero_grad()
    learn.opt = None
    set_seed(1, reproducible=True)
    learn.dls.train.rng = random.Random(0)
    learn.fit(2, 1e-2, cbs=cbs)
    return [v.clone() for v in learn.model.state_dict().values()],[o for o in L(learn.recorder.values).concat()]

def _same(a, b, skip=()): return all(torch.equal(x, y) for x,y in zip(a[0], b[0])) and np.array_equal(a[1], b[1], equal_nan=True)

@lru_cache(None)
def _without(event, ex, first):
    "The error of a fit without our callback: metrics have nothing to count where a batch of the validation set was left out"
    try: _learner('')[0].fit(2, 1e-2, cbs=Raises(event, ex, first))
    except Exception as e: return type(e)

def at_event(nm, event, ex, first, ref={}):
    "What is wrong after `ex` at `event`: nothing, an empty list"
    s = settings[nm]
    learn,t,w = _learner(nm)
    make = lambda: s.make(t, _parts()[2])
    torch.manual_seed(3)
    kd = make()
    if s.attached: learn.add_cb(kd)
    # what data keep of their first use
    for dl in learn.dls.loaders: dl.one_batch()
    was,bad,raised = _as_it_is(learn, t),[],Raises(event, ex, first)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: learn.fit(2, 1e-2, cbs=[*([] if s.attached else [kd]),*s.more(),raised])
        except ex: pass
        except Exception as e:
            if type(e) is not _without(event, ex, first): bad.append(f'{type(e).__name__}: {e}')
        if not raised.n: bad.append('not reached')
        # an attached callback hears of no error that is not its own: the next thing that the Learner does puts all back
        if s.attached: learn.validate()
        now = _as_it_is(learn, t)
        bad += [k for k in was if now[k]!=was[k]]
        def again(learn, kd): torch.manual_seed(3); return _fit(learn, [*([] if s.attached else [kd]),*s.more()], w)
        if not s.same:
            if s.attached: learn.remove_cb(kd)
            torch.manual_seed(3)
            kd = make()
            if s.attached: learn.add_cb(kd)
        try: res = again(learn, kd)
        except Exception as e: return [*bad,f'the next fit: {type(e).__name__}: {e}']
        if nm not in ref:
            new = _learner(nm)[0]
            torch.manual_seed(3)
            kd = make()
            if s.attached: new.add_cb(kd)
            ref[nm] = again(new, kd)
    # seconds are not compared
    if 'cost' in nm: res,r = (res[0],[]),(ref[nm][0],[])
    else: r = ref[nm]
    return bad if _same(res, r) else [*bad,'the next fit differs']

# -- stores
def _store(d, sp, packed=False):
    "A store of twelve rows in two parts: its path, keys, and what it holds"
    from test_store import guards,keys_of,say
    keys = keys_of(6)
    s = TargetStore.create(d/'s', make_manifest(sp, views=2, vocab=list('abc'), teacher=dict(name='t', hash='1')))
    for ks in np.array_split(keys, 2):
        with TargetWriter(s, ks) as w:
            for v in range(2): w.put(ks, say(sp, ks, [v]*len(ks)), v, **guards(ks))
    if packed: s = s.pack(d/'s.safetensors')
    return s.path,keys,[s.fields(s.rows(keys, v), list(s._files)) for v in range(2)]

def _read(path, keys, want):
    "What reading a damaged store comes to: 'refused', 'rows missing', 'no difference'; or the failures 'silently wrong' and 'error of another kind'"
    try:
        s,n = TargetStore(path),0
        for v in range(2):
            r = s.rows(keys, v)
            got,has = s.fields(r[r>=0], list(want[v])),r>=0
            if any(got[k].tobytes()!=want[v][k][has].tobytes() for k in want[v]): return 'silently wrong'
            n += has.sum()
        if s.verify(bar=noop)!=n: return 'silently wrong'
    except (ValueError,FileNotFoundError): return 'refused'
    except Exception as e: return f'error of another kind: {type(e).__name__}: {e}'
    return 'no difference' if n==12 else 'rows missing'
_fine = ('refused','rows missing','no difference')

def _damage(path, keys, want, change, n, rng):
    "`n` times, one after the other: change a file, read, put it back; counts by kind of file"
    res = defaultdict(Counter)
    fs = [path] if path.is_file() else sorted(o for o in path.rglob('*') if o.is_file() and o.stat().st_size)
    for i in range(n):
        f = fs[i%len(fs)]
        b = f.read_bytes()
        try: change(f, b, rng); res['a packed file' if f.suffix=='.safetensors' else re.sub(r'^[ab]\.', '', f.name)][_read(path, keys, want)] += 1
        finally: f.write_bytes(b)
    assert _read(path, keys, want)=='no difference'
    return res

def _flip(f, b, rng):
    from test_store import flip
    flip(f, rng.randrange(8*len(b)))
def _cut(f, b, rng):
    "Shorter by any length, longer by zeros, by a part of itself or by all of it, or gone"
    how = rng.randrange(8)
    if how==0: f.unlink()
    else: f.write_bytes([b+b'\0', b+b[-64:], b+b][how-1] if how<4 else b[:rng.randrange(len(b))])

def _damaged(change, trials):
    from test_store import kinds
    rng,tot = random.Random(0),defaultdict(Counter)
    with tempfile.TemporaryDirectory() as d:
        for i,sp in enumerate(kinds):
            for packed in (False,True):
                (p:=Path(d)/f'{i}{packed}').mkdir()
                for k,c in _damage(*_store(p, sp, packed), change, max(1, trials//(2*len(kinds))), rng).items(): tot[k].update(c)
    return [dict(what=k, trials=c.total(), failures=sum(v for o,v in c.items() if o not in _fine), **{o.replace(' ','_'):c[o] for o in _fine}, which=[o for o in c if o not in _fine]) for k,c in sorted(tot.items())]
def flips(trials): return _damaged(_flip, trials)
def cuts(trials): return _damaged(_cut, trials)

# -- kill -9
def _precompute_in(rank, n, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n))
    import _ddp
    _ddp.precompute(_ddp.teacher(), path)

def _killed_precompute(d, most, n, seed=0):
    "Kill `precompute_targets` in `n` processes, `most` times; the store is then completed, and equal to one that was not disturbed"
    import _ddp
    from test_store import child
    os.environ.pop('RANK', None); os.environ.pop('WORLD_SIZE', None)
    ref = _ddp.precompute(_ddp.teacher(), d/'ref')
    keys = np.concatenate([p.keys for p in ref.parts])
    t0 = time.perf_counter(); _ddp.precompute(_ddp.teacher(), d/'timed'); took = time.perf_counter()-t0
    rng,killed,i,sizes = random.Random(seed),0,0,set()
    def _right(path):
        s = TargetStore(path)
        r = s.rows(keys)
        assert torch.equal(s.get(r[r>=0]), ref.get(ref.rows(keys[r>=0]))) if n==1 else torch.allclose(s.get(r[r>=0]), ref.get(ref.rows(keys[r>=0])), atol=1e-5), 'rows differ'
        assert s.verify(bar=noop)==(r>=0).sum()
        return int((r>=0).sum())
    while killed<most:
        pids = [child(_precompute_in, r, n, d/str(i)) for r in range(n)]
        for end,pid in sorted((rng.random()*1.2*took, p) for p in pids):
            time.sleep(max(0, end*.5))
            os.kill(pid, signal.SIGKILL)
        stats = [os.waitpid(p, 0)[1] for p in pids]
        assert all(os.WIFSIGNALED(o) or os.WEXITSTATUS(o)==0 for o in stats), stats
        killed += sum(map(os.WIFSIGNALED, stats))
        if not (d/str(i)/'manifest.json').exists(): continue
        sizes.add(m:=_right(d/str(i)))
        if m==len(keys) or rng.random()<.1:
            _ddp.precompute(_ddp.teacher(), d/str(i))
            assert _right(d/str(i))==len(keys), 'not complete'
            i += 1
    return sizes

def kills(trials):
    from test_store import kills as writers
    res = []
    for what,f in {**{f'a writer of a store, {n} at a time':partial(writers, writers=n) for n in (1,4)}, **{f'`precompute_targets`, {n} at a time':lambda d, most, n=n: _killed_precompute(d, most, n) for n in (1,2)}}.items():
        with tempfile.TemporaryDirectory() as d:
            try: sizes,bad = f(Path(d), most=max(1, trials//10)),[]
            except AssertionError as e: sizes,bad = (),[str(e)[:200]]
        res.append(dict(what=what, trials=max(1, trials//10), failures=len(bad), sizes=len(sizes), which=bad))
        print(res[-1], flush=True)
    return res

# -- two processes
def processes(trials):
    "Once each, however many `trials`"
    import test_processes as tp
    from _ddp import saving,TargetStore
    res = []
    def row(what, tried, bad):
        res.append(dict(what=what, trials=tried, failures=len(bad), which=[str(o)[:200] for o in bad[:3]]))
        print(res[-1], flush=True)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        saving(d, 'one')
        out,rc = tp.launch('main', d, *tp.torchrun)
        both = [torch.load(d/f'{r}.pt', weights_only=False) for r in range(2)]
        bad = [(nm,r,msg) for nm in tp.says for r,o in enumerate(both) if not ((msg:=o['wrong'][nm]).startswith('ValueError: ') and re.search(tp.says[nm], msg))]
        row('wrong in one process, said by both: no teacher, probabilities, another teacher, T, alpha, loss, terms, state, items, store, a cache, NaN, a store made otherwise', 2*len(tp.says), bad)
        row('a fit after these', 2, [r for r,o in enumerate(both) if not torch.equal(o['again'][0], o['kd'][0])])
        row('an error in the middle of training ends both', 1, [] if rc and 'batch 2 of epoch 0 is not finite' in out else [out[-300:]])
    def alone(what, f, says, patience):
        with tempfile.TemporaryDirectory() as d:
            port = tp.free_port()
            ps = [tp.start(tp.alone_in, r, f, Path(d), port, patience) for r in range(2)]
            for p in ps: p.join(120)
            hangs = [p for p in ps if p.is_alive()]
            for p in hangs: p.kill()
            said = (Path(d)/'0.txt').read_text() if (Path(d)/'0.txt').exists() else 'nothing'
        row(what, 1, ['hangs']*bool(hangs) or ([] if re.match(f'(?s){says}', said) else [said]))
    for what,f,says,patience in [('one process trains without the callback', tp.goes_alone, 'TimeoutError: .*rank 0 has waited', 2.), ('one is killed in training', tp.is_killed, 'RuntimeError: ', 60.),
        ('one is killed while it fills a store', tp.is_killed_at_precompute, 'TimeoutError: precompute_targets: rank 0 has waited', 2.), ('one trains without the callback, and the other one is refused', tp.only_one_comes, 'ValueError: .*they sum to 1', 5.)]: alone(what, f, says, patience)
    return res

# -- an exception at every event, and fuzzing
def at_events(trials):
    "All of them once, in each setting; fewer `trials` are a sample"
    res,rng,every = [],random.Random(0),list(itertools.product(events, exceptions, (True,False)))
    for nm in settings:
        bad,n = [],0
        for ev,ex,first in rng.sample(every, min(trials, len(every))):
            n += 1
            if (b:=at_event(nm, ev, ex, first)): bad.append((ev,ex.__name__,'before' if first else 'after',b))
        res.append(dict(what=nm, trials=n, failures=len(bad), which=[str(o)[:200] for o in bad[:5]]))
        print(res[-1], flush=True)
    return res

_fuzzed = dict(callback=('arguments of `KnowledgeDistillation`, and a fit', 2), term=('arguments of `Term`, and a fit', 2), teacher=('arguments of `Teacher`, and a fit', 2), taps=('layers and arguments of `Taps`', 1), precompute=('arguments of `precompute_targets`', 8), loss=('tensors and arguments of every loss', .5),
    manifest=('a manifest edited, with and without its checksum', .5), manifest_bytes=('bytes of a manifest', .5))
def fuzz(trials):
    "Most of cheap examples"
    from test_fuzz import properties,trial
    res = []
    for nm,(what,cost) in _fuzzed.items():
        failed = []
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            n = trial(properties[nm][0], int(trials/cost), False, failed)
        res.append(dict(what=what, trials=n.total(), failures=len(failed), taken=n[True], refused=n[False], which=[f'{type(e).__name__}: {e}: {ex!r}'[:300] for ex,e in failed[:5]]))
        print(res[-1], flush=True)
    return res

all_parts = dict(kills=kills, flips=flips, cuts=cuts, processes=processes, events=at_events, fuzz=fuzz)

def versions():
    import fastai,hypothesis,platform
    return dict(system=f'{platform.system()} {platform.machine()}', cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__, numpy=np.__version__, hypothesis=hypothesis.__version__)

@call_parse
def main(
    parts:str=','.join(all_parts), # Parts to run
    trials:int=2000, # Of those that are drawn at random; a tenth as many kills
    out:str=str(here/'faults.json') # File to write
):
    "Try what can go wrong, and count"
    out = Path(out)
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    for nm in parts.split(','):
        rows = all_parts[nm](trials)
        print(pd.DataFrame(rows)[['what','trials','failures']].to_string(), flush=True)
        res = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**res, 'versions':versions(), nm:rows}, indent=1)+'\n')
