"Two processes on the CPU give what one gives, or end together with the reason"
import socket,subprocess,sys
from functools import lru_cache
import pytest
pytest.importorskip('accelerate')
from _ddp import *
import _ddp,fastkd.ranks
from conftest import ended,root,start

script = Path(_ddp.__file__)

def env(**kw): return {**{k:v for k,v in os.environ.items() if k not in ('RANK','WORLD_SIZE')}, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', **kw}
def launch(what, d, *cmd):
    "What the command printed, and its exit status"
    p = subprocess.Popen([*cmd, str(script), what, str(d)], env=env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: return p.communicate(timeout=600)[0],p.returncode
    except subprocess.TimeoutExpired:
        p.terminate() # the launcher ends its processes, then
        try: out = p.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired as e: out = (e.output or b'').decode()
        pytest.fail(f"the processes hang:\n{out[-5000:]}")
torchrun = sys.executable,'-m','torch.distributed.run','--standalone','--nproc_per_node','2'
# `--cpu --num_processes 2` starts one process, unless there is MPI; this starts two, and `distrib_ctx(cpu=True)` keeps them off GPUs
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])
def accelerate(): return sys.executable,'-m','accelerate.commands.launch','--multi_gpu','--num_machines','1','--num_processes','2','--mixed_precision','no','--dynamo_backend','no','--main_process_port',free_port()

def share(rank, n, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n))
    precompute(teacher(), path)

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "Results of two processes by rank, what they printed, their folder"
    d = tmp_path_factory.mktemp('ranks')
    saving(d, 'one')
    # a third of a store, by another number of processes
    ended(start(share, 1, 3, d/'partly'))
    assert len(TargetStore(d/'partly'))==23
    out,rc = launch('main', d, *torchrun)
    assert all((d/f'{r}.pt').exists() for r in range(2)), out[-5000:]
    return SimpleNamespace(res=[torch.load(d/f'{r}.pt', weights_only=False) for r in range(2)], out=out, rc=rc, d=d)

kd_w,alone_w = [lru_cache(None)(lambda f=f: f()[0]) for f in (kd,alone)]
def gap(a, b): return (a-b).abs().max().item() if a.shape==b.shape else math.nan
def same(one, both, nm):
    "Two processes have one result, which is that of one process"
    a,b = [r[nm] for r in both.res]
    for x,y,z in [(one[0],a[0],b[0]),*((v,a[1][k],b[1][k]) for k,v in one[1].items())]:
        if isinstance(x, Tensor): assert torch.equal(y, z) and gap(x, y)<=1e-6, (nm,gap(y, z),gap(x, y))
        elif isinstance(x, dict):
            assert list(x)==list(y) and y==z, (x,y,z)
            for k in x: assert abs(x[k]-y[k])<1e-5, (nm,k,x[k],y[k])
        else: assert x==y==z, (nm,x,y,z)

@pytest.mark.parametrize('f', runs, ids=lambda f: f.__name__)
def test_equals_one_process(both, f):
    "Weights, adapters, banks and columns after training in two processes are those of one on the same batches"
    one = f()
    same(one, both, f.__name__)
    # the run is about something: what distils ends elsewhere than the student alone
    assert f in (alone,kd) or not 1e-4>gap(one[0], kd_w())
    assert f is alone or not 1e-4>gap(one[0], alone_w())

@pytest.mark.parametrize('f', with_folder, ids=lambda f: f.__name__)
def test_stored_targets(both, f): same(f(both.d), both, f.__name__)

def test_store_is_as_live(both):
    for r in both.res: assert gap(r['stored'][0], r['kd'][0])<1e-5 and gap(r['block'][0], r['kd'][0])<1e-5

def test_teacher(both):
    "Not wrapped, not trained, its batch norm and modes as they were"
    for r in both.res: assert r['kd'][1].items()>=dict(same=True, grads=0, training=True, wrapped='Sequential', plain='Sequential').items()

def test_columns_are_of_all(both):
    "By hand: `kd_loss` and `task_loss` of the first batch of an epoch with a learning rate of 0"
    learn,t = make(),Teacher(teacher())
    fit(learn, KD(t), n=1, lr=0.)
    x,y = [torch.stack([get_x(i) for i in range(48)]),tensor([get_y(i) for i in range(48)])]
    z = learn.model(x)
    want = dict(task_loss=F.cross_entropy(z, y).item(), kd_loss=F.kl_div(F.log_softmax(z/2, 1), F.softmax(t(x)/2, 1), reduction='batchmean').item())
    for tab in (table(learn),*(r['at_rest'] for r in both.res)):
        for k,v in want.items(): assert abs(tab[k]-v)<1e-6, (k,tab[k],v)

def test_goes_on_with_another_number(both):
    "Adapters and banks that one process saved, loaded by two, and the other way round"
    same(going_on(both.d, 'one'), both, 'going_on')
    sd = torch.load(both.d/'two.pth', weights_only=True)
    w,o = going_on(both.d, 'two')
    for k in o: assert gap(o[k], going_on(both.d, 'one')[1][k])<1e-6
    assert list(sd)==['names','adapters']

def test_each_for_itself(both):
    "Outside of `distrib_ctx` processes train students of their own, with adapters and banks of their own"
    for r,o in enumerate(both.res): assert gap(o['apart'][0], apart(r)[0])<1e-6
    assert gap(*[o['apart'][0] for o in both.res])>.01

says = dict(none='there is no teacher', probs='they sum to 1', teacher=r'but the teacher is Teacher\(Sequential, 1,744 parameters\), weights \w+ \(rank 0\) and Teacher\(Sequential, .*, weights \w+ \(rank 1\)',
    T=r'T is 4.0 \(rank 0\) and 3.0 \(rank 1\)', alpha=r'alpha is \[0.9, 0.45, 0.0\] \(rank 0\) and \[0.9, 0.5,', loss=r'the loss is KDLoss.*\(rank 0\) and DKDLoss', terms=r"terms is \[.*hint.*\] \(rank 0\) and \[\] \(rank 1\)",
    loaded=r'the state of the adapters is \w+ \(rank 0\) and new \(rank 1\)', items=r'training items is 48 \(rank 0\) and 46 \(rank 1\)', store='the teacher is a store of .* and a store of ', cache='`precompute_targets',
    nan='(?s)NaN or inf in 1 of 4 rows.*Items: 31', made='were made otherwise')
@pytest.mark.parametrize('nm', says)
def test_wrong_in_one_is_said_by_all(both, nm):
    for r in range(2):
        msg = both.res[r]['wrong'][nm]
        assert msg.startswith('ValueError: ') and re.search(says[nm], msg), msg
        if r==0 and nm in ('none','probs','nan'): assert 'rank 1 of 2 could not go on: ValueError: ' in msg, msg

def test_all_is_told(both): assert set(both.res[0]['wrong'])==set(says)
def test_a_fit_after_errors(both):
    for r in both.res: assert torch.equal(r['again'][0], r['kd'][0])

def test_precompute(both, tmp_path):
    "Each its share, one store, the rows of one process; what another number of processes began is completed"
    one,keys = precompute(teacher(), tmp_path/'one'),item_keys(data().train)
    keys = np.concatenate([keys, item_keys(data().valid)])
    for nm,n_parts in (('store',2),('partly',3)):
        s = TargetStore(both.d/nm)
        assert len(s)==70==both.res[0]['rows']==both.res[1]['resumed'] and len(s.parts)==n_parts
        assert gap(s.get(s.rows(keys)), one.get(one.rows(keys)))<1e-5
    # the first process stopped when the second one failed, and what both had by then is stored
    assert both.res[0]['nan_rows']<70

def test_raises_in_training(both):
    "An error of one process in the middle of training ends all"
    assert both.rc!=0 and 'batch 2 of epoch 0 is not finite: 16 of 16 values' in both.out

def test_accelerate(both, tmp_path):
    "The same by `accelerate launch`; and a process that is killed while it fills a store ends all, and the store is completed afterwards"
    out,rc = launch('short', tmp_path, *accelerate())
    for r in range(2): assert torch.equal(torch.load(tmp_path/f'{r}.pt', weights_only=False)['kd'][0], both.res[0]['kd'][0]), out[-3000:]
    assert rc!=0 and 'SIGKILL' in out, out[-3000:]
    n = len(TargetStore(tmp_path/'killed'))
    assert 0<n<70
    asked = []
    t = Killed(teacher(), 1000)
    t.register_forward_pre_hook(lambda m,x: asked.append(len(x[0])))
    s = precompute(t, tmp_path/'killed')
    assert len(s)==70 and sum(asked)==70-n
    one,keys = precompute(teacher(), tmp_path/'one'),item_keys(data().train)
    assert gap(s.get(s.rows(keys)), one.get(one.rows(keys)))<1e-5

# -- without a launcher, which would end the others
def alone_in(rank, f, d, port, patience):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    fastkd.ranks._patience = patience
    without_gpu()
    try: f(d)
    except Exception as e: (d/f'{rank}.txt').write_text(f'{type(e).__name__}: {e}')

@pytest.mark.parametrize('f,says', [(goes_alone,'TimeoutError: .*rank 0 has waited 2 s for rank 1 of 2'), (is_killed,'RuntimeError: '), (is_killed_at_precompute,'TimeoutError: precompute_targets: rank 0 has waited 2 s for rank 1 of 2'),(only_one_comes,'ValueError: .*they sum to 1')],
    ids=lambda o: getattr(o, '__name__', ''))
def test_nobody_waits_for_ever(tmp_path, f, says):
    "A process that went another way or died is noticed by the other one"
    port = free_port()
    # where both are expected, a slow machine may take its time
    for p in [start(alone_in, r, f, tmp_path, port, 2. if 'waited 2 s' in says else 60. if f is is_killed else 5.) for r in range(2)]: ended(p)
    assert re.match(f'(?s){says}', (tmp_path/'0.txt').read_text()), (tmp_path/'0.txt').read_text()

def test_opened_before_the_others_were_done(tmp_path):
    "A store that a process opened when others had not written their share yet is looked at again"
    ended(start(share, 0, 2, tmp_path/'s'))
    s = TargetStore(tmp_path/'s')
    assert len(s)==35
    with pytest.raises(ValueError, match='24 of 48 training items have no stored answer'): fit(make(), KD(s))
    ended(start(share, 1, 2, tmp_path/'s'))
    assert gap(weights(fit(make(), KD(s)).model), kd_w())<1e-5

# -- one process, several devices
@pytest.mark.parametrize('f', [kd,feature,crd], ids=lambda f: f.__name__)
def test_data_parallel(f, monkeypatch):
    "`to_parallel` wraps the student in `DataParallel`, which on the CPU hands batches through: the same, bit for bit"
    one,wrapped = f(),[]
    def parallel(learn, kd=None, n=2, lr=.1, **kw):
        class Look(Callback):
            order = 90
            def before_batch(self): wrapped.append(type(self.learn.model))
        with learn.no_bar(), learn.no_logging(), learn.parallel_ctx(): learn.fit(n, lr, cbs=[*L(kd),Look()])
        return learn
    monkeypatch.setattr(_ddp, 'fit', parallel)
    w,more = f()
    assert set(wrapped)=={nn.DataParallel} and torch.equal(w, one[0])
    for k,v in more.items(): assert torch.equal(v, one[1][k]) if isinstance(v, Tensor) else v==one[1][k]

def test_devices():
    "A teacher without weights, or with a part that stays on another device, is refused before the first step"
    learn = make()
    w = weights(learn.model)
    with pytest.raises(ValueError, match="meta"): fit(learn, KD(teacher().to('meta')))
    class Split(nn.Module):
        def __init__(self): super().__init__(); self.m,self.other = teacher(),torch.ones(4, device='meta')
        def forward(self, x): return self.m(x)+self.other
    with pytest.raises(ValueError, match='the teacher cannot run on the student.s inputs'): fit(learn, KD(Split()))
    assert torch.equal(weights(learn.model), w)
