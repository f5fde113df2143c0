"Predicting, validating, inspecting and exporting with the callback attached: as without it, wherever the teacher's answers come from"
import pytest
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from contextlib import nullcontext
from copy import deepcopy
import pickle,subprocess,sys
from fastai.callback.preds import MCDropoutCallback
from test_regressions import Count,Spy,ce,close,few,fit,hook_count,kl,net,quiet,reseed,same,teach,weights

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore')
KD = KnowledgeDistillation
# a live teacher of logits: test_regressions.py
kinds = ['terms','store','carried','cache']

def student(dls, path, **kwargs):
    learn = digits_learner(dls, path=path, **kwargs)
    learn.model.insert(4, nn.Dropout(.3))
    return learn

@pytest.fixture(scope='module')
def stored(net, tmp_path_factory): return precompute_targets(net, digits_dls(128), tmp_path_factory.mktemp('s')/'store', bar=noop)

@pytest.fixture(scope='module', params=kinds)
def made(request, net, stored, tmp_path_factory):
    "The same Learner twice after the same training: with the callback attached, and without; and the counter of the teacher's calls"
    kind,n,dls,d = request.param,Count(deepcopy(net)),digits_dls(128),tmp_path_factory.mktemp('made')
    if kind=='carried': dls = stored.attach(dls)
    kd = dict(terms=lambda: KD(n, terms=[Term('at', '1', 'm.1', name='at_loss'), Term('hint', '2', 'm.2', name='hint_loss')]), store=lambda: KD(stored), carried=KD, cache=lambda: KD(n, cache=d/'cache'))[kind]()
    a = student(dls, d/'a', cbs=kd)
    reseed(dls)
    fit(a, 2)
    b = student(digits_dls(128), d/'b')
    b.model.load_state_dict(a.model.state_dict())
    b.create_opt()
    b.opt.load_state_dict(deepcopy(a.opt.state_dict()))
    for l in (a,b): l.path.mkdir(exist_ok=True, parents=True)
    return a,b,n

@pytest.fixture
def pair(made, net):
    a,b,n = made
    n.n = 0
    yield made
    assert n.n==0, 'the teacher was asked'
    assert a.metrics.map(lambda m: m.name)==b.metrics.map(lambda m: m.name)==['accuracy'] and not hook_count(a.model, net)
    plt.close('all')

def both(pair, f):
    "`f` of both is the same, bit for bit; what it was"
    a,b,_ = pair
    res = []
    for l in (a,b):
        reseed(l.dls)
        with l.no_bar(), l.no_logging(): res.append(f(l))
    same(*res)
    same(weights(a), weights(b))
    return res[0]

def titles(): return [[ax.get_title(),*[t.get_text() for t in ax.texts if not t.get_text().startswith('teacher: ')]] for i in plt.get_fignums() for ax in plt.figure(i).axes]

# ---------------------------------------------------------------- predictions
def predictions(l):
    its,dl = l.dls.valid.items[:70],l.dls.test_dl
    return [l.get_preds(), l.get_preds(ds_idx=0), l.get_preds(with_input=True, with_decoded=True, with_loss=True), l.get_preds(ds_idx=0, with_loss=True, reorder=False, act=noop),
        l.get_preds(dl=dl(its))[0], l.get_preds(dl=dl(its))[1], l.get_preds(dl=dl(its, with_labels=True), with_loss=True), l.get_preds(dl=l.dls.valid), l.get_preds(concat_dim=0, cbs=MCDropoutCallback())]
def one(l):
    cls,i,p = l.predict(l.dls.valid.items[3])
    inp,*rest = l.predict(l.dls.valid.items[3], with_input=True)
    return [str(cls),i,p,tensor(inp),str(rest[0]),*rest[1:]]
def validation(l): return [list(l.validate()), list(l.validate(ds_idx=0)), list(l.validate(dl=l.dls.test_dl(l.dls.valid.items[:50], with_labels=True))), list(l.recorder.metric_names)]

def test_get_preds(pair):
    res = both(pair, predictions)
    p,y,loss = res[0][0],res[0][1],res[2][4]
    close(loss, ce(p.log(), y, reduction='none'), rtol=1e-3, atol=1e-4)
    assert res[5] is None and len(res[2])==5 and len(res[3][0])==128
def test_predict(pair): both(pair, one)
def test_tta(pair): both(pair, lambda l: [l.tta(n=2), l.tta(n=1, use_max=True), l.tta(dl=l.dls.test_dl(l.dls.valid.items[:9]))[0]])
def test_validate(pair):
    res = both(pair, validation)
    assert [len(o) for o in res[:3]]==[2,2,2]

# ---------------------------------------------------------------- looking
def test_show_results(pair):
    def f(l):
        plt.close('all')
        l.show_results(max_n=4, shuffle=False)
        l.show_results(ds_idx=0, max_n=4)
        return titles()
    assert sum(map(len, both(pair, f)))>=8

def test_interpretation(pair):
    def f(l):
        plt.close('all')
        it,itt = ClassificationInterpretation.from_learner(l),Interpretation.from_learner(l, ds_idx=0)
        it.plot_top_losses(4); it.plot_confusion_matrix(); itt.plot_top_losses(3)
        losses,idxs = it.top_losses(20)
        return [losses,list(idxs),list(itt.top_losses(9)[1]),tensor(it.confusion_matrix()),[[str(o) for o in r] for r in it.most_confused(3)],titles()]
    both(pair, f)

def test_summary(pair):
    "The same table; the callback is one line of the list below it"
    lines = lambda l: [o for o in str(l.summary()).splitlines() if 'KnowledgeDistillation' not in o]
    both(pair, lines)
    assert 'KnowledgeDistillation' in str(pair[0].summary())
    pair[0].show_training_loop()

def test_one_batch(pair):
    both(pair, lambda l: [list(map(tensor, l.dls.train.new(shuffle=False).one_batch()[:2])), list(map(tensor, l.dls.valid.one_batch())), l.dls.n_inp])

def test_lr_find(pair):
    def f(l):
        l.create_opt()
        return [float(o) for o in l.lr_find(num_it=12, show_plot=False, suggest_funcs=(minimum,steep))]+[torch.stack(list(l.recorder.losses)),list(l.recorder.metric_names)]
    both(pair, f)

# ---------------------------------------------------------------- amid a fit, and after it
class Inner(Callback):
    "What others look at between epochs; each epoch has its own random numbers"
    order = 55
    def __init__(self, f): self.f,self.o = f,[]
    def before_epoch(self): reseed(self.learn.dls, self.learn.epoch)
    def after_epoch(self): self.o.append(self.f(self.learn))

@pytest.fixture
def amid(pair):
    yield pair
    # training asked the teacher
    pair[2].n = 0

def test_inner(amid):
    "`get_preds(inner=True)`, `FetchPredsCallback` and `validate` between epochs see the student, and training goes on as it would have"
    a,b,n = amid
    def check(l):
        with torch.no_grad(): z = l.model.eval()(l.dls.valid.one_batch()[0].as_subclass(Tensor))
        was = l.dl
        p,y = l.get_preds(inner=True)
        same(p, z.softmax(1))
        l.dl = was
        return p
    runs,terms,was = [],a.knowledge_distillation.terms,deepcopy([a.model.state_dict(),a.opt.state_dict()])
    if terms: was.append(deepcopy(terms.state_dict()))
    def restore():
        for o,sd in zip((a.model,a.opt,terms), was): o.load_state_dict(deepcopy(sd))
    for cbs in (lambda l: Inner(noop),lambda l: Inner(check),lambda l: [Inner(noop),FetchPredsCallback(dl=l.dls.valid, with_decoded=True)]):
        fit(a, 2, cbs=cbs(a))
        runs.append((weights(a),np.array(a.recorder.values, dtype=float)))
        restore()
    for w,rows in runs[1:]:
        same(runs[0][0], w)
        close(runs[0][1], rows)
    assert runs[0][1].shape[1]>=5 and np.isfinite(runs[0][1]).all()

def test_taken_off(amid):
    "`removed_cbs` trains without the teacher, and it is back after it"
    a,b,n = amid
    if carries(a.dls.train): return # batches of three need the callback
    for l,ctx in ((a,a.removed_cbs(a.knowledge_distillation)),(b,nullcontext())):
        reseed(l.dls)
        with ctx: quiet(l, l.fit, 1, 1e-2)
    same(weights(a), weights(b))
    assert n.n==0 and isinstance(a.knowledge_distillation, KD) and 'kd_loss' not in a.recorder.metric_names

# ---------------------------------------------------------------- files
def test_export(pair):
    "The file is that of the plain Learner but for the name of a callback, and loads where fastkd is not installed"
    a,b,_ = pair
    files = [l.path/'export.pkl' for l in (a,b)]
    for l,f in zip((a,b), files): l.export(f)
    assert abs(files[0].stat().st_size-files[1].stat().st_size)<2000
    new = load_learner(files[0])
    assert not any(isinstance(cb, KD) for cb in new.cbs)
    its = b.dls.valid.items[:20]
    with new.no_bar(): same(new.get_preds(dl=new.dls.test_dl(its))[0], quiet(b, b.get_preds, dl=b.dls.test_dl(its))[0])
    for l in (a,b): assert l.dls.train.n==128

load = """
import sys,warnings
warnings.filterwarnings('ignore')
class Block:
    def find_spec(self, name, *args):
        if name.split('.')[0]=='fastkd': raise ImportError('fastkd is not installed here')
sys.meta_path.insert(0, Block())
from fastai.vision.all import *
for k,ref in torch.load('ref.pt').items():
    learn,fs = load_learner(f'{k}.pkl'),sorted(Path('imgs').ls())
    with learn.no_bar(), learn.no_logging():
        p = learn.get_preds(dl=learn.dls.test_dl(fs))[0]
        assert torch.equal(p, ref) and learn.predict(fs[0])[0]==learn.dls.vocab[p[0].argmax()]
    assert 'fastkd' not in sys.modules
    print(k)
"""

def test_export_elsewhere(tmp_path):
    "Image classifiers of ordinary `DataLoaders`, exported with the callback, its terms or its stored targets attached, load where fastkd is not installed"
    from sklearn.datasets import load_digits
    d,t,ref = load_digits(n_class=4),tiny_cnn((16,32), c=4, ch=3),{}
    (tmp_path/'imgs').mkdir()
    for i in range(40): PILImage.create(np.repeat((d.images[i]*15).astype(np.uint8)[...,None], 3, 2)).save(tmp_path/'imgs'/f'{d.target[i]}_{i}.png')
    fs = sorted((tmp_path/'imgs').ls())
    dls = ImageDataLoaders.from_name_re(tmp_path, fs, r'^(\d)_', bs=8, num_workers=0, seed=0)
    store = precompute_targets(t, dls, tmp_path/'store', bar=noop)
    for k,dl,kd in (('terms',dls,KD(t, terms=Term('hint', '1', '1', name='hint_loss'))), ('store',dls,KD(store)), ('carried',store.attach(dls),KD())):
        learn = Learner(dl, tiny_cnn((4,8), c=4, ch=3), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=kd, path=tmp_path)
        fit(learn, 1)
        learn.export(f'{k}.pkl')
        ref[k] = quiet(learn, learn.get_preds, dl=learn.dls.test_dl(fs))[0]
    torch.save(ref, tmp_path/'ref.pt')
    r = subprocess.run([sys.executable, '-c', load], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg'})
    assert r.returncode==0 and r.stdout.split()==list(ref), r.stderr[-3000:]

def test_pickle(few, net):
    "A pickled Learner keeps its data, but neither teacher nor store; it predicts alike and trains on alone"
    b = [(x.as_subclass(Tensor),y.as_subclass(Tensor)) for x,y in zip(*few.train.new(shuffle=False, bs=128).one_batch())]
    learn = Learner(DataLoaders(DataLoader(b, bs=64), DataLoader(b, bs=64)), tiny_cnn(), loss_func=CrossEntropyLossFlat(), cbs=KD(net, terms=Term('at', '1', '1')))
    fit(learn, 1)
    new,big = pickle.loads(pickle.dumps(learn)),len(pickle.dumps(net))
    assert not any(isinstance(cb, KD) for cb in new.cbs) and isinstance(learn.knowledge_distillation, KD)
    same(*[quiet(l, l.get_preds, with_loss=True) for l in (learn,new)])
    fit(new, 1)
    n = len(pickle.dumps(learn))
    learn.remove_cb(KD)
    assert 0<n-len(pickle.dumps(learn))<500<big
