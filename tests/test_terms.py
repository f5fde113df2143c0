"Every loss on layers as a term of `KnowledgeDistillation`: it is computed, it trains, it leaves nothing behind"
import pytest,torch
from fastai.vision.all import *
from fastkd.losses import logits
from fastkd.all import *
from fastkd.test_utils import *
from contextlib import nullcontext
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(64, bs=32)
teacher = digits_teacher(epochs=2)

def fit(*terms, n=1, cbs=None, learn=None, **kw):
    learn,kd = ifnone(learn, digits_learner(dls)),KnowledgeDistillation(teacher, terms=terms, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, cbs=[kd,*L(cbs)])
    return learn,kd

maps,vectors,pyramid = '2','4',['0','1','2']
cases = {**{k:maps for k in 'hint at attention nst ofd ab vid ft kta affinity ickd hidden wkd_feat rkd sp pkt cka skd_direction norm simkd'.split()},
    **{k:vectors for k in 'pad srd cc nd'.split()}, 'reviewkd':pyramid, 'fsp':['0','1']}

@pytest.mark.parametrize('nm', cases)
def test_term(nm):
    o = cases[nm]
    learn,kd = fit(Term(nm, o, o, weight=.01))
    assert fit_table(learn)[nm].notna().all() and np.isfinite(fit_table(learn)[nm]).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for l in (learn,teacher) for m in l.model.modules())
    assert set(learn.model.state_dict())==set(tiny_cnn().state_dict())

def test_every_layer_loss_is_a_case():
    responses = {k for k in list_losses() if type(get_loss(k)).__name__ in logits.__all__}
    # mgd needs a generator, catkd and dist_plus class maps, crd and sskd more than layers: each has its own test
    assert set(list_losses())-responses-set(cases)=={'mgd','catkd','dist_plus','crd','sskd','aux_sskd'}

def test_generator_and_bank():
    learn,_ = fit(Term(MGDLoss(generator=mgd_generator(128)), maps, maps), Term(CRDLoss(k=32), vectors, vectors))
    assert np.isfinite(fit_table(learn)[['mgd','crd']].values).all()

class TestBank:
    "CRD sees the items that are in the batch, whatever the order"
    def test_index(self):
        crd,seen = CRDLoss(k=16),[]
        class Watch(Callback):
            order,run_valid = 100,False
            def before_batch(self): seen.append((self.dl.items_now.copy(), self.x.clone()))
        fit(Term(crd, vectors, vectors), cbs=Watch())
        x = torch.stack([dls.train_ds[i][0] for i in range(64)]).as_subclass(Tensor)
        train = seen[:2]
        assert sorted(np.concatenate([i for i,_ in train]))==list(range(64))
        for i,b in train: assert torch.equal(b.as_subclass(Tensor), x[i])

@pytest.mark.parametrize('terms', [(Term('at', '1', '1', weight=3.),), (Term('at', '1', '1', weight=3.), Term('rkd', '2', '2', weight=2.)), (Term('kd', weight=.5),)])
def test_sum(terms):
    "loss = w task + alpha kd + the weighted terms, on the batch at hand"
    class Seen(Callback):
        order,run_valid = 100,False
        def after_loss(self):
            if self.iter==0: self.seen = [o.detach().clone() for o in (self.x,self.y,self.loss)]
    learn,seen = digits_learner(dls),Seen()
    model = deepcopy(learn.model).train()
    fit(*terms, learn=learn, cbs=seen, alpha=.3, T=2.)
    x,y,loss = seen.seen
    x,t = x.as_subclass(Tensor),teacher.model.eval()
    taps = [o.student[0] for o in terms if o.layers]
    with torch.no_grad(), (Taps(model, taps) if taps else nullcontext()) as a, (Taps(t, taps) if taps else nullcontext()) as b:
        z,zt = model(x),t(x)
        fs,ft = (a.take(),b.take()) if taps else ([],[])
    want = .7*F.cross_entropy(z, y)+.3*kd_loss(z, zt, T=2.)
    i = 0
    for o in terms:
        want += o.weight*(o.loss(fs[i], ft[i]) if o.layers else o.loss(z, zt))
        i += o.layers
    torch.testing.assert_close(loss.as_subclass(Tensor), want, rtol=1e-5, atol=1e-5)

def test_adapter_learns():
    learn,kd = fit(Term('hint', maps, maps))
    before = {k:v.clone() for k,v in kd.terms.opt.modules.state_dict().items() if 'weight' in k}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=kd)
    after = kd.terms.opt.modules.state_dict()
    assert all((after[k]!=v).any() for k,v in before.items())

def test_lr_find_and_fine_tune_keep_adapters():
    learn,kd = digits_learner(dls, splitter=lambda m: L([params(m[:2]), params(m[2:])])),KnowledgeDistillation(teacher, terms=[Term('hint', maps, maps)])
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, cbs=kd)
        w = {k:v.clone() for k,v in kd.terms.opt.modules.state_dict().items()}
        with learn.added_cbs(kd): learn.lr_find(show_plot=False, num_it=5)
    for k,v in kd.terms.opt.modules.state_dict().items(): assert torch.equal(v, w[k]), k

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixup(mix):
    learn,_ = fit(Term('at', '1', '1'), Term('nd', vectors, vectors), cbs=mix())
    assert np.isfinite(fit_table(learn)[['at','nd']].values).all()

def test_accumulation_and_bf16():
    learn = digits_learner(dls).to_bf16()
    fit(Term('hint', maps, maps), learn=learn, cbs=GradientAccumulation(64))
    assert np.isfinite(fit_table(learn)['hint']).all()

class TestBadInput:
    def refused(self, says, *terms, exc=ValueError, **kw):
        learn = digits_learner(dls)
        w = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with pytest.raises(exc) as e: fit(*terms, learn=learn, **kw)
        for s in L(says): assert s in str(e.value), str(e.value)
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, w[k]), k
        assert not any(m._forward_hooks for l in (learn,teacher) for m in l.model.modules())
    def test_student_layer(self): self.refused(['the student has no layer','layer9'], Term('at', 'layer9', '1'))
    def test_teacher_layer(self): self.refused(['the teacher has no layer','layer9'], Term('at', '1', 'layer9'))
    def test_no_adapter(self): self.refused('no adapter joins', Term('simkd', vectors, vectors))
    def test_never_broadcast(self): self.refused(['student','teacher'], Term('hint', '0', '0', adapter=None))
    def test_unequal_lists(self):
        with pytest.raises(ValueError, match='one to one'): Term('at', ['0','1'], ['1'])
    def test_one_side(self):
        with pytest.raises(ValueError, match='name a layer of both'): Term('at', '0')
    def test_no_term(self):
        with pytest.raises(TypeError, match='`terms` holds Terms'): KnowledgeDistillation(teacher, terms=['at'])
    def test_stored(self, tmp_path):
        store = precompute_targets(teacher, dls, tmp_path/'s', bar=noop)
        learn = digits_learner(dls)
        with learn.no_bar(), pytest.raises(ValueError, match='one live teacher'): learn.fit(1, cbs=KnowledgeDistillation(store, terms=[Term('at', '1', '1')]))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=KnowledgeDistillation(store, terms=[Term('hard')]))

def test_resume(tmp_path):
    "A fit that goes on from files ends where one in memory ends: student, adapter, optimizers and memory bank"
    def make():
        learn = digits_learner(digits_dls(150))
        learn.path = tmp_path
        return learn,KnowledgeDistillation(teacher, terms=[Term('hint', '2', '2'), Term(CRDLoss(k=16), '4', '4', weight=.1)])
    def go_on(learn, kd):
        set_seed(3); learn.dls.train.rng = random.Random(3)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=kd)
        return {**learn.model.state_dict(), **{f'kd.{k}':v.clone() for k,v in kd.terms.opt.modules.state_dict().items()}}
    learn,kd = make()
    go_on(learn, kd)
    learn.save('student')
    assert kd.save(tmp_path/'models'/'student_kd').suffix=='.pth'
    exp = go_on(learn, kd)
    new,kd2 = make()
    new.create_opt(); new.load('student')
    kd2.load(tmp_path/'models'/'student_kd')
    # a copy that was never used saves what it was given
    assert kd2.terms.state_dict()['names']==['hint','crd']
    got = go_on(new, kd2)
    assert got.keys()==exp.keys() and any('bank_s' in k for k in got)
    for k,v in got.items(): torch.testing.assert_close(v, exp[k], msg=k, equal_nan=True)
    with pytest.raises(ValueError, match='of the terms'): KnowledgeDistillation(teacher, terms=Term('at', '1', '1')).load(tmp_path/'models'/'student_kd')

class NoStep(Callback):
    order = -50
    def after_step(self): raise RuntimeError('a step was taken')

class Skips(nn.Module):
    "Runs its second block only when it trains"
    def __init__(self): super().__init__(); self.net = tiny_cnn((4,4,16))
    def forward(self, x):
        x = self.net[0](x)
        if self.training: x = self.net[1](x)
        for m in self.net[2:]: x = m(x if m is not self.net[2] or x.shape[-1]==4 else F.avg_pool2d(x,2))
        return x

@pytest.mark.parametrize('term,msg', [
    (lambda: Term(CRDLoss(n_items=50, k=16), vectors, vectors), "a bank of 50 items is too small for 64; build it with `n_items=64`"),
    (lambda: Term('hint', '0:input', '0', adapter=None), r"student \(32, 1, 8, 8\) and teacher \(32, 32, 8, 8\) must have one shape"),
    (lambda: Term('hint', '0', '1', adapter=None), r"student \(32, 4, 8, 8\) and teacher \(32, 64, 4, 4\) must have one shape"),
    (lambda: Term('at', 99, '1'), "the student has no layer 99"),
    (lambda: Term('at', '1', 'layer1'), "the teacher has no layer 'layer1'"),
    (lambda: Term('at', nn.Linear(2,2), '1'), "this Linear is part of another model"),
    (lambda: Term('vid', '4', '4'), "no adapter joins"),
    (lambda: Term('mgd', '2', '2'), "needs a trained generator"),
    (lambda: Term('catkd', '2', '2'), "must agree in items and channels"),
    (lambda: Term('sskd', '4', '4'), "add the callback `Rotations"),
    (lambda: Term('at', '1', '1', weight=lambda p: 1-2*p), "`weight` must be")])
def test_refused_before_a_step(term, msg):
    learn = digits_learner(dls)
    was = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=msg): fit(term(), learn=learn, cbs=NoStep())
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*learn.model.modules(),*teacher.model.modules()])

def test_layer_that_did_not_run():
    with pytest.raises(ValueError, match="'net.1'.*(not|did)"): fit(Term('at', 'net.1', '1'), learn=Learner(dls, Skips(), metrics=accuracy), cbs=NoStep())

def test_unlabelled():
    "A loss that reads labels, on batches without"
    db = DataBlock(blocks=TransformBlock, get_items=lambda _: [o[0].as_subclass(Tensor) for o in dls.train_ds], splitter=RandomSplitter(seed=0))
    unlabelled = db.dataloaders('digits', bs=16)
    unlabelled.n_inp = 1
    learn = Learner(unlabelled, tiny_cnn(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match="nd.*needs labels, and these batches have none"): fit(Term('nd', '4', '4'), learn=learn, cbs=NoStep(), alpha=1.)

class TestReview:
    "What a hostile review found"
    def refused(self, msg, terms, learn=None, **kw):
        learn = ifnone(learn, digits_learner(dls))
        was = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with pytest.raises(ValueError, match=msg), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=[KnowledgeDistillation(kw.pop('teacher', teacher), terms=terms, **kw),NoStep()])
        assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())

    def test_cache(self, tmp_path): self.refused('without a store or `cache`', Term('hint', '1', '1'), cache=tmp_path/'c')

    def test_tuple(self):
        "Terms on logits see the part of the prediction that is distilled"
        class Two(nn.Module):
            def forward(self, z): return z,z*2
        learn = Learner(dls, nn.Sequential(tiny_cnn(), Two()), loss_func=lambda p,y: F.cross_entropy(p[0], y))
        learn,_ = fit(Term('dist'), Term('srd', '0.4', '4', weight=.01), learn=learn, loss='kd', pred_kd=1)
        assert np.isfinite(fit_table(learn)[['dist','srd']].values).all()

    def test_column_of_labels(self):
        "Labels of a table, `(n,1)`, as the response loss takes them"
        xs,ys = dls.train_ds.tls[0],torch.tensor([int(o[1]) for o in dls.train_ds])
        x = torch.stack([o[0].as_subclass(Tensor) for o in dls.train_ds])
        tables = DataLoaders(*[DataLoader(list(zip(x, y)), bs=32) for y in (ys[:,None],ys[:,None])])
        tables.c = 10
        vals = []
        for d in (dls,tables):
            learn = Learner(d, digits_learner(dls).model, loss_func=CrossEntropyLossFlat(), opt_func=SGD)
            d.train.shuffle = False
            learn,_ = fit(Term('dkd'), learn=learn, alpha=0., start=0.)
            vals.append(fit_table(learn)['dkd'].item())
            d.train.shuffle = d is dls
        assert abs(vals[0]-vals[1])<1e-4

    def test_bank_and_mixup(self):
        self.refused('MixUp', Term('crd', vectors, vectors), learn=digits_learner(dls, cbs=MixUp()))
        fit(Term(CRDLoss(k=16, by_class=False), vectors, vectors), learn=digits_learner(dls, cbs=MixUp()))

    def test_half_teacher(self):
        for nm in ('crd','cc','ft','hint'):
            learn,kd = digits_learner(dls),KnowledgeDistillation(Teacher(teacher, dtype=torch.bfloat16), terms=Term(CRDLoss(k=16) if nm=='crd' else nm, maps, maps, weight=.01))
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=kd)
            assert np.isfinite(fit_table(learn)[nm]).all()

    def test_wrapped_again(self):
        "Adapters are of the module, not of what wraps it"
        learn,kd = fit(Term('hint', '1', '1'))
        opt,m = kd.terms.opt,learn.model
        learn.model = nn.DataParallel(m)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=kd)
        assert kd.terms.opt is opt

    def test_copy(self):
        learn = digits_learner(dls)
        kd = KnowledgeDistillation(teacher, terms=Term('hint', '1', '1'))
        learn.add_cb(kd)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        opt,w = kd.terms.opt,[p.detach().clone() for p in kd.terms.opt.params]
        other = deepcopy(learn)
        with other.no_bar(), other.no_logging(): other.fit(1, 0.)
        theirs = first(other.cbs, lambda o: isinstance(o, KnowledgeDistillation)).terms
        assert kd.terms.opt is opt and theirs.opt is not opt
        for a,b,c in zip(w, opt.params, theirs.opt.params):
            assert torch.equal(a, b) and b is not c
            torch.testing.assert_close(a, c)

    @pytest.mark.parametrize('nm', ['srd','pad','rkd','sp','pkt','cc','cka','skd_direction'])
    def test_last_batch_of_one(self, nm): self.refused('the last one of 33 items would hold 1', Term(nm, vectors, vectors), learn=digits_learner(digits_dls(33, bs=32)))

    def test_adapters(self):
        self.refused(r"Term\(hint.*its adapter cannot take student \(32, 4, 8, 8\) and teacher \(32, 64, 4, 4\)", Term('hint', '0', '1', adapter=nn.Conv2d(3,8,1)))
        self.refused('one module cannot adapt a list', Term('hint', ['0','1'], ['0','1'], adapter=nn.Conv2d(4,8,1)))
        self.refused('got 1 adapters; pass one per pair', Term('hint', ['0','1'], ['0','1'], adapter=[nn.Conv2d(4,32,1)]))
        learn,kd = fit(Term('hint', ['0','1'], ['0','1'], adapter=[nn.Conv2d(4,32,1),nn.Conv2d(8,64,1)]))
        assert len(kd.terms.adapters[0])==2 and np.isfinite(fit_table(learn).hint).all()

    def test_not_finite(self):
        self.refused('is inf for the first validation batch', Term(lambda a,b: (a-b).pow(2).sum()*float('inf'), '0', '0', name='wild'))

    def test_off_is_off(self):
        "A weight of 0 leaves the student what it is without the term, even where the value is not finite"
        res,n = [],itertools.count()
        def late(a, b): return (a-b).pow(2).sum()*(1. if next(n)<1 else float('inf'))
        for terms in ((),(Term(late, '0', '0', weight=0., name='late'),)):
            learn = digits_learner(dls)
            fit(*terms, learn=learn)
            res.append(learn.model.state_dict())
        for k,v in res[0].items(): assert torch.equal(v, res[1][k]), k

    def test_load_fails_again(self, tmp_path):
        _,kd = fit(Term('hint', '1', '1'))
        f = kd.save(tmp_path/'kd')
        k = KnowledgeDistillation(teacher, terms=Term('hint', '2', '2')).load(f)
        for _ in range(2):
            with pytest.raises(ValueError, match='does not belong to these adapters'), (learn:=digits_learner(dls)).no_bar(), learn.no_logging(): learn.fit(1, cbs=[k,NoStep()])
        learn = digits_learner(dls); learn.path = tmp_path; learn.save('student')
        torch.save(learn.model, tmp_path/'whole.pth')
        with pytest.raises(ValueError, match='was not written by'): k.load(tmp_path/'whole.pth')
        with pytest.raises(ValueError, match='of the terms'): k.load(tmp_path/'models'/'student.pth')

    def test_one_callback_many_students(self):
        "Adapters and memory bank begin anew with a new student"
        vals,kd = [],KnowledgeDistillation(teacher, terms=Term(CRDLoss(k=16), vectors, vectors))
        for k in (kd,kd,KnowledgeDistillation(teacher, terms=Term(CRDLoss(k=16), vectors, vectors))):
            learn = digits_learner(dls)
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=k)
            vals.append(fit_table(learn).crd.item())
        assert vals[0]==vals[1]==vals[2]
        learn.dls = digits_dls(96, bs=32, seed=1)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=k)

    def test_names(self):
        assert Terms([Term('hint','1','1'), Term('rkd','1','1',name='hint_2'), Term('hint','2','2')]).names==['hint','hint_2','hint_3']
        for nm in ('task_loss','kd_loss','accuracy','valid_loss'): self.refused('give the Term another `name`', Term('hint', '1', '1', name=nm))

    def test_hidden(self):
        "More layers of the teacher: its last ones, or those that are named"
        assert Term('hidden', ['1','2'], ['0','1','2']).teacher==['1','2']
        assert Term(HiddenStatesLoss(layers=[0,2]), ['1','2'], ['0','1','2']).teacher==['0','2']
        fit(Term(HiddenStatesLoss(layers=[0,2]), ['1','2'], ['0','1','2']))
        with pytest.raises(ValueError, match='one to one: got 2 of the student and 3'): Term(HiddenStatesLoss(layers=[0,5]), ['1','2'], ['0','1','2'])

    def test_starts_differ(self):
        _,kd = fit(Term('hint', '1', '1'), Term('hint', '1', '1'))
        a,b = [next(o.parameters()) for o in kd.terms.adapters]
        assert (a-b).abs().max()>.01

    def test_broadcast(self): self.refused('must have one shape', Term(nn.MSELoss(), '0:input', '0', adapter=None))
