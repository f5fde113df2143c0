"Classes by name: teachers whose classes are others than the student's, with the loss of a batch computed by hand"
import pytest,torch
from fastai.vision.all import *
from fastai.callback.mixup import MixUp
from fastkd.all import *
from fastkd.test_utils import *
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

names = [str(i) for i in range(10)]
dls = digits_dls(128)
def net(c, seed=0, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        m = tiny_cnn(c=c, **kw).eval()
        with torch.no_grad():
            for p in m[-1].parameters(): p.mul_(20)
        return m

class Spy(Callback):
    "The first batch, and the gradient of the loss at the student's logits"
    order,run_valid = 100,False
    def after_pred(self):
        if hasattr(self, 'x0'): return
        self.learn.pred = self.pred.detach().requires_grad_()
        self.x0,self.y0,self.z0 = self.x.as_subclass(Tensor).clone(),self.y.as_subclass(Tensor).clone(),self.pred
    def after_loss(self):
        if not hasattr(self, 'loss0'): self.loss0,self.g0 = self.learn.loss_grad.item(),torch.autograd.grad(self.learn.loss_grad.as_subclass(Tensor), self.z0, retain_graph=True)[0]
    def after_batch(self): raise CancelFitException

def first_batch(teacher, learn=None, cbs=(), **kw):
    learn,spy = learn or digits_learner(dls),Spy()
    kd = KnowledgeDistillation(teacher, **kw)
    with warnings.catch_warnings(record=True) as spy.warned, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(1, 1e-3, cbs=[kd,*cbs,spy])
    spy.warned = [str(w.message) for w in spy.warned if 'teacher' in str(w.message) or 'stored' in str(w.message)]
    return spy

def kl(z, zt, T, axis=1): return T**2*(F.softmax(zt/T, axis)*(F.log_softmax(zt/T, axis)-F.log_softmax(z/T, axis))).sum(axis).mean()
def close(a, b, tol=1e-5): assert abs(a-float(b))<=tol*max(1, abs(a)), (a, float(b))

# name of the teacher's vocabulary -> its classes
vocabs = dict(permuted=names[::-1], larger=['cat',*names[::-1],'dog','eel'], smaller=['3','1','4','9','5'], partly=['cat','7','2','dog','0'])
def both(vocab):
    "Positions of the shared classes: the student's, the teacher's"
    s = [i for i,o in enumerate(names) if o in vocab]
    return s,[vocab.index(names[i]) for i in s]

class TestValues:
    @pytest.mark.parametrize('nm', vocabs)
    def test_softmax(self, nm):
        "T other than 1: the loss over the shared classes, both sides renormalised"
        v,m = vocabs[nm],net(len(vocabs[nm]))
        spy = first_batch(Teacher(m, vocab=v, missing='ignore'), T=3., alpha=.7)
        s,t = both(v)
        with torch.no_grad(): zt = m(spy.x0)
        close(spy.loss0, .3*F.cross_entropy(spy.z0, spy.y0)+.7*kl(spy.z0[:,s], zt[:,t], 3.))
        # the same, from the probabilities at T: what remains of the teacher's is divided by its sum
        p,q = (zt/3).softmax(1)[:,t],(spy.z0/3).softmax(1)[:,s]
        p,q = p/p.sum(1, keepdim=True),q/q.sum(1, keepdim=True)
        close(spy.loss0, .3*F.cross_entropy(spy.z0, spy.y0)+.7*9*(p*(p.log()-q.log())).sum(1).mean(), 1e-4)
        said = {'permuted':'in another order', 'larger':'more than', 'smaller':'knows 5 of', 'partly':'knows 3 of'}[nm]
        assert any(said in o for o in spy.warned), spy.warned

    @pytest.mark.parametrize('nm', ['smaller','partly'])
    def test_other_classes_are_let_alone(self, nm):
        "No gradient of the response loss at the logits of classes that the teacher does not know"
        spy = first_batch(Teacher(net(len(vocabs[nm])), vocab=vocabs[nm], missing='ignore'), alpha=1.)
        s,_ = both(vocabs[nm])
        rest = [i for i in range(10) if i not in s]
        assert (spy.g0[:,rest]==0).all() and (spy.g0[:,s]!=0).any()

    def test_binary(self):
        tdls = digits_dls(128, task='traits')
        v = ['loop','new','even'] # of even, large, loop
        m = net(3)
        spy = first_batch(Teacher(m, vocab=v, missing='ignore'), digits_learner(tdls), alpha=1., T=2.)
        with torch.no_grad(): zt = m(spy.x0)[:,[2,0]]/2
        z = spy.z0[:,[0,2]]/2
        p = zt.sigmoid()
        close(spy.loss0, 4*(p*(F.logsigmoid(zt)-F.logsigmoid(z))+(1-p)*(F.logsigmoid(-zt)-F.logsigmoid(-z))).mean())
        assert (spy.g0[:,1]==0).all() and (spy.g0[:,[0,2]]!=0).any()
        # one shared label is enough
        first_batch(Teacher(net(2), vocab=['loop','new'], missing='ignore'), digits_learner(tdls))

    @pytest.mark.parametrize('ignore', [-100,0,2])
    def test_segmentation(self, ignore):
        "Classes on axis 1; positions that are ignored in the student's numbering are ignored in the shared one"
        sdls = digits_dls(64, task='ink')
        m = net(3, dense=True)
        learn = digits_learner(sdls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=ignore))
        learn.dls.vocab = ['empty','light','dark']
        spy = first_batch(Teacher(m, vocab=['dark','sky','light'], missing='ignore'), learn, alpha=1., T=2.)
        with torch.no_grad(): zt = m(spy.x0)[:,[2,0]]/2
        z,keep = spy.z0[:,[1,2]]/2,spy.y0!=ignore
        per = 4*(zt.softmax(1)*(zt.log_softmax(1)-z.log_softmax(1))).sum(1)
        close(spy.loss0, per[keep].mean())
        assert (spy.g0[:,0]==0).all()

    @pytest.mark.parametrize('loss', ['nkd','dkd'])
    def test_losses_with_labels(self, loss):
        "Items of classes that the teacher does not know are left out, the labels of the others are counted anew"
        v = vocabs['partly']
        m = net(len(v))
        spy = first_batch(Teacher(m, vocab=v, missing='ignore'), alpha=1., loss=loss)
        s,t = both(v)
        with torch.no_grad(): zt = m(spy.x0)[:,t]
        known = torch.tensor([y in s for y in spy.y0.tolist()])
        assert 0<known.sum()<len(known)
        y = torch.tensor([s.index(o) for o in spy.y0[known].tolist()])
        close(spy.loss0, get_loss(loss)(spy.z0[:,s][known], zt[known], targ=y))

    def test_mixup(self):
        v = vocabs['partly']
        spy = first_batch(Teacher(net(len(v)), vocab=v, missing='ignore'), alpha=1., cbs=[MixUp()])
        s,t = both(v)
        with torch.no_grad(): close(spy.loss0, kl(spy.z0[:,s], net(len(v))(spy.x0)[:,t], 5.))
        assert np.isfinite(first_batch(Teacher(net(len(v)), vocab=v, missing='ignore'), loss='nkd', cbs=[MixUp()]).loss0)

    def test_logit_term(self):
        v = vocabs['smaller']
        m = net(len(v))
        spy = first_batch(Teacher(m, vocab=v, missing='ignore'), alpha=0., task_weight=0., terms=Term('mse_logits', weight=2.))
        s,t = both(v)
        with torch.no_grad(): close(spy.loss0, 2*F.mse_loss(spy.z0[:,s], m(spy.x0)[:,t]), 1e-4)

    def test_tuple_predictions(self):
        class Two(nn.Module):
            def __init__(self): super().__init__(); self.m = net(10)
            def forward(self, x): z = self.m(x); return z,z*2
        v = vocabs['smaller']
        learn = digits_learner(dls, loss_func=lambda p,y: F.cross_entropy(p[0], y), metrics=[])
        learn.model,m = Two(),net(len(v), 1)
        kd = KnowledgeDistillation(Teacher(m, vocab=v, missing='ignore'), 'kd', alpha=1., T=2.)
        seen = {}
        class Look(Callback):
            order,run_valid = 100,False
            def after_loss(self): seen.update(x=self.x, z=self.pred, loss=self.learn.loss_grad.item()); raise CancelFitException
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True): learn.fit(1, cbs=[kd,Look()])
        s,t = both(v)
        with torch.no_grad(): close(seen['loss'], kl(seen['z'][1][:,s], m(seen['x'].as_subclass(Tensor))[:,t], 2.), 1e-4)

class TestStored:
    "A store goes through the names in its manifest, by the same rule"
    @pytest.fixture(scope='class')
    def stores(self, tmp_path_factory):
        d,res = tmp_path_factory.mktemp('stores'),{}
        for nm,v in vocabs.items():
            theirs = copy(dls)
            theirs.vocab = v
            res[nm] = precompute_targets(Teacher(net(len(v))), theirs, d/nm, dtype='float32', bar=noop)
        theirs = copy(dls); theirs.vocab = vocabs['permuted']
        res['sparse'] = precompute_targets(Teacher(net(10)), theirs, d/'sparse', kind='sparse', T=3., k=10, bar=noop)
        theirs = copy(dls); theirs.vocab = vocabs['larger']
        res['sparse_larger'] = precompute_targets(Teacher(net(13)), theirs, d/'sparse_larger', kind='sparse', T=3., k=10, bar=noop)
        theirs = copy(dls); theirs.vocab = vocabs['smaller']
        res['sparse_smaller'] = precompute_targets(Teacher(net(5)), theirs, d/'sparse_smaller', kind='sparse', T=3., k=5, bar=noop)
        return res

    @pytest.mark.parametrize('nm', [*vocabs,'sparse','sparse_smaller'])
    def test_as_live(self, stores, nm):
        v = vocabs[{'sparse':'permuted','sparse_smaller':'smaller'}.get(nm, nm)]
        spy = first_batch(StoredTeacher(stores[nm], missing='ignore'), T=3., alpha=.7)
        s,t = both(v)
        with torch.no_grad(): want = .3*F.cross_entropy(spy.z0, spy.y0)+.7*kl(spy.z0[:,s], net(len(v))(spy.x0)[:,t], 3.)
        close(spy.loss0, want, 2e-3 if 'sparse' in nm else 1e-4)
        assert any('stored' in o for o in spy.warned)

    def test_trains(self, stores):
        "A whole epoch, with the guard that compares stored answers with labels"
        learn = digits_learner(dls)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True): learn.fit(2, 1e-2, cbs=KnowledgeDistillation(StoredTeacher(stores['partly'], missing='ignore')))

    @pytest.mark.parametrize('nm,msg', [('smaller',"does not know 5 of the student's 10 classes"), ('partly','does not know 7'), ('sparse_larger',"store kind='dense'")])
    def test_refused(self, stores, nm, msg):
        with pytest.raises(ValueError, match=msg): first_batch(stores[nm])
    def test_says_how(self, stores):
        with pytest.raises(ValueError) as e: first_batch(stores['smaller'])
        assert "StoredTeacher(store, missing='ignore')" in str(e.value)

class TestRefused:
    def test_by_default(self):
        with pytest.raises(ValueError, match=r"does not know 5 of the student's 10 classes: \['0', '2', '6', '7', '8'\]"): first_batch(Teacher(net(5), vocab=vocabs['smaller']))
    @pytest.mark.parametrize('missing', ['error','ignore'])
    def test_nothing_in_common(self, missing):
        with pytest.raises(ValueError, match='no class in common'): first_batch(Teacher(net(3), vocab=['cat','dog','eel'], missing=missing))
    def test_case_is_not_guessed(self):
        v = [f'Class {i}' for i in range(10)]
        d2 = copy(dls); d2.vocab = [f'class_{i}' for i in range(10)]
        with pytest.raises(ValueError, match=r"'class_0': Did you mean 'Class 0'"): first_batch(Teacher(net(10), vocab=v), digits_learner(d2))
    def test_one_class(self):
        with pytest.raises(ValueError, match='share 1 of 10 classes; a softmax'): first_batch(Teacher(net(2), vocab=['3','cat'], missing='ignore'))
    def test_wrong_number_of_names(self):
        with pytest.raises(ValueError, match='answers with 5 values, its vocabulary names 4'): first_batch(Teacher(net(5), vocab=vocabs['smaller'][:4], missing='ignore'))
    def test_duplicates(self):
        with pytest.raises(ValueError, match=r"duplicates: \['1'\]"): first_batch(Teacher(net(11), vocab=['1',*names]))
    def test_bad_missing(self):
        for cls in (partial(Teacher, net(3)),StoredTeacher):
            with pytest.raises(ValueError, match="'error' or 'ignore', got 'drop'"): cls(missing='drop')
    def part(self, **kw): return Teacher(net(5), vocab=vocabs['smaller'], missing='ignore', **kw)
    def test_ensemble(self):
        with pytest.raises(ValueError, match="same of the student's classes"): first_batch([self.part(),net(10, 1)])
        v = vocabs['smaller']
        spy = first_batch([self.part(),Teacher(net(5, 1), vocab=v[::-1], missing='ignore')], alpha=1., T=2.)
        s,t = both(v)
        with torch.no_grad(): p = (net(5)(spy.x0)[:,t].softmax(1)+net(5, 1)(spy.x0)[:,[4-i for i in t]].softmax(1))/2
        close(spy.loss0, kl(spy.z0[:,s], p.log(), 2.), 1e-4)
    def test_cache_and_precompute(self, tmp_path):
        with pytest.raises(ValueError, match='does not know all'): first_batch(self.part(), cache=tmp_path/'a')
        with pytest.raises(ValueError, match='does not know all'): precompute_targets(self.part(), dls, tmp_path/'b', bar=noop)
        assert not (tmp_path/'b').exists()
    def test_teacher_that_learns(self):
        with pytest.raises(ValueError, match='does not know all of their classes'): first_batch(self.part(), teacher_weight=1.)
    def test_labels_without_ignore_index(self):
        with pytest.raises(ValueError, match='no `ignore_index`'): first_batch(self.part(), loss=lambda inp, teach, targ: F.cross_entropy(inp, targ))
    def test_term_with_labels(self):
        with pytest.raises(ValueError, match='compares their logits by label'): first_batch(self.part(), terms=Term('nkd'))
    def test_dicts(self):
        class Dict(nn.Module):
            def __init__(self, c): super().__init__(); self.m = net(c)
            def forward(self, x): return {'a':self.m(x)}
        learn = digits_learner(dls, loss_func=lambda p,y: F.cross_entropy(p['a'], y), metrics=[])
        learn.model = Dict(10)
        with pytest.raises(ValueError, match='whole dicts'): first_batch(Teacher(Dict(5), vocab=vocabs['smaller'], missing='ignore'), learn, loss=DictLoss({'a':'kd'}))

class TestAround:
    def test_no_false_alarm(self):
        "The teacher's accuracy is that on the classes it knows"
        few = digits_dls(vocab=['none','other',*names])
        t = digits_teacher(epochs=3, widths=(8,16,32))
        spy = first_batch(Teacher(t, missing='ignore'), digits_learner(few))
        assert not [o for o in spy.warned if 'chance' in o]
        spy = first_batch(Teacher(t.model, vocab=names[::-1][:9]+['x'], missing='ignore'), digits_learner(few))
        assert [o for o in spy.warned if 'chance' in o]

    def test_unlabelled(self):
        "The stand-in for a label is a class of the student"
        v = vocabs['smaller']
        learn = digits_learner(dls)
        class NoLabels(Callback):
            run_valid,order = False,-1
            def before_batch(self): self.learn.yb = ()
        seen = []
        class Look(Callback):
            order,run_valid = 100,False
            def after_loss(self): seen.append((self.x,self.pred,self.y,self.learn.loss_grad.item()))
        m = net(5)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True): learn.fit(1, 1e-3, cbs=[NoLabels(),KnowledgeDistillation(Teacher(m, vocab=v, missing='ignore'), alpha=1., T=2.),Look()])
        s,t = both(v)
        x,z,y,loss = seen[0]
        with torch.no_grad(): zt = m(x.as_subclass(Tensor))[:,t]
        assert y.tolist()==[s[i] for i in zt.argmax(1).tolist()]
        close(loss, kl(z[:,s].as_subclass(Tensor), zt, 2.), 1e-4)

    def test_several_fits_and_both_ways(self):
        "The rule belongs to the data at hand: a second Learner that the teacher knows all classes of is compared on all"
        v = vocabs['smaller']
        t,m = Teacher(net(10), vocab=names, missing='ignore'),net(10)
        kd = KnowledgeDistillation(t, alpha=1., T=2.)
        few = digits_dls(128, vocab=['none',*names])
        for d2,idx in ((few,range(1, 11)),(dls,range(10)),(few,range(1, 11))):
            learn,spy = digits_learner(d2),Spy()
            with warnings.catch_warnings(record=True), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[kd,spy])
            with torch.no_grad(): close(spy.loss0, kl(spy.z0[:,list(idx)], m(spy.x0), 2.))
        assert t.shared is None and t.idx is None
