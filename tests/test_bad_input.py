"Wrong input: an error that says what came and what to do, and nothing changed; or the right behaviour"
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
import copy,pickle
import numpy as np,pytest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

pytestmark = pytest.mark.filterwarnings('ignore:Using a non-tuple', 'ignore:.*deprecated')
KD = KnowledgeDistillation

def fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kwargs)
def reseed(dls):
    set_seed(0, reproducible=True)
    dls.train.rng = random.Random(0)

@pytest.fixture(scope='module')
def few(): return digits_dls(128)
@pytest.fixture(scope='module')
def teach(): return digits_teacher(epochs=4, widths=(8,16,32))
@pytest.fixture
def net(teach): return copy.deepcopy(teach.model)

class Wrap(nn.Module):
    "A model whose answer is changed by `f`"
    def __init__(self, m, f): super().__init__(); self.m,self.f = m,f
    def forward(self, *x): return self.f(self.m(*x))

def files(d): return {p.relative_to(d).as_posix():p.read_bytes() for p in Path(d).rglob('*') if p.is_file()}
def state(learn, *models):
    "All that a failed fit must leave alone"
    hooks = sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for o in (learn.model,*models) for m in o.modules())
    return dict(metrics=[id(o) for o in learn.metrics], loss_func=id(learn.loss_func), cbs=[id(o) for o in learn.cbs if not isinstance(o, ProgressCallback)], dls=id(learn.dls), model=id(learn.model), hooks=hooks, files=files(learn.path),
        student=[v.numpy().tobytes() for v in learn.model.state_dict().values()], training=[m.training for m in learn.model.modules()],
        teachers=[v.numpy().tobytes() for m in models for v in m.state_dict().values()], modes=[m.training for o in models for m in o.modules()], grads=[p.grad is None for o in models for p in o.parameters()])

def refused(ex, msg, learn, make, *models, at='fit', cbs=()):
    "`make()` gives the callback: it, or the fit with it, fails with `msg` (all of these texts) and changes nothing"
    models = [m for m in models if isinstance(m, nn.Module)]
    was = state(learn, *models)
    kds = []
    with pytest.raises(ex) as e:
        kds = L(make())
        if at=='init': learn.add_cbs(kds)
        fit(learn, 2, cbs=[*cbs, *(kds if at=='fit' else [])])
    assert type(e.value) is ex
    for o in L(msg): assert o in str(e.value), f'{o!r} is not in: {e.value}'
    if at=='init':
        for kd in kds: was['cbs'].append(id(kd))
    now = state(learn, *models)
    for k in was: assert now[k]==was[k], k
    # the Learner is as good as new
    learn.remove_cbs(kds if at=='init' else [])
    assert len(learn.validate())==1+len(learn.metrics)
    fit(learn)
    return str(e.value)

def learner(dls, tmp_path, **kwargs):
    path = tmp_path/'student'
    path.mkdir()
    (path/'keep.txt').write_text('mine')
    return digits_learner(dls, path=path, **kwargs)
@pytest.fixture
def learn(few, tmp_path): return learner(few, tmp_path)
at = pytest.mark.parametrize('at', ['fit','init'])

# ---------------------------------------------------------------- classes
class TestClasses:
    @at
    def test_other_count(self, learn, at):
        t = tiny_cnn((4,), c=12)
        refused(ValueError, ['12 classes','10','vocab='], learn, lambda: KD(t), t, at=at)

    @at
    def test_missing_class(self, learn, few, net, at):
        "A Learner that knows other classes: the missing ones are named"
        refused(ValueError, ["'8', '9'","does not know"], learn, lambda: KD(Teacher(tiny_cnn((4,), c=8), vocab=[str(i) for i in range(8)])), at=at)

    @pytest.mark.parametrize('vocab', [[str(i) for i in reversed(range(10))], list('3175908264')])
    def test_permuted_learner(self, few, teach, net, vocab):
        "Aligned by name, with a warning: trains as with the teacher in the student's order"
        tdls = digits_dls(128, vocab=vocab)
        idx = [int(v) for v in vocab]
        t = Learner(tdls, Wrap(net, lambda o: o[:,idx]))
        ws = []
        for o,warns in ((net,False),(t,True)):
            learn,losses = digits_learner(few),[]
            class See(Callback):
                order,run_valid = KD.order+.5,False
                def after_loss(self): losses.append(self.learn.loss.item())
            reseed(few)
            with warnings.catch_warnings(record=True) as ws_:
                warnings.simplefilter('always')
                fit(learn, 2, cbs=[KD(o, alpha=.9), See()])
            msgs = [str(w.message) for w in ws_]
            assert any('another order' in m and 'aligned by name' in m for m in msgs)==warns
            assert not any('chance' in m for m in msgs)
            ws.append((losses,torch.cat([p.flatten() for p in learn.model.parameters()])))
        np.testing.assert_allclose(*[o[0] for o in ws], rtol=1e-6)
        torch.testing.assert_close(*[o[1] for o in ws], rtol=1e-5, atol=1e-6)

    def test_student_permuted(self, teach, net):
        "The student's vocabulary is the odd one"
        vocab = list('3175908264')
        dls = digits_dls(128, vocab=vocab)
        losses = []
        class See(Callback):
            order,run_valid = KD.order+.5,False
            def after_loss(self):
                with torch.no_grad(): t = net.eval()(*self.learn.xb)[:,[int(v) for v in vocab]]
                losses.append((self.learn.loss.item(),kd_loss(self.learn.pred, t, T=4.).item()))
        with pytest.warns(UserWarning, match='another order'): fit(digits_learner(dls), 2, cbs=[KD(teach, alpha=1, T=4.), See()])
        np.testing.assert_allclose(*zip(*losses), rtol=1e-5)

    def test_superset(self, few, net):
        "A teacher that knows more classes: they are dropped"
        t = Teacher(Wrap(net, lambda o: torch.cat([o.new_full((len(o),2), 9.), o], 1)), vocab=['a','b',*map(str, range(10))])
        seen = []
        class See(Callback):
            order,run_valid = KD.order+.5,False
            def after_loss(self):
                with torch.no_grad(): seen.append((self.learn.loss.item(),kd_loss(self.learn.pred, net.eval()(*self.learn.xb), T=4.).item()))
        with pytest.warns(UserWarning, match='more'): fit(digits_learner(few), cbs=[KD(t, alpha=1, T=4.), See()])
        np.testing.assert_allclose(*zip(*seen), rtol=1e-5)

    def test_module_in_wrong_order_warns(self, few, net):
        "A bare module has no names: the answers are near chance"
        with pytest.warns(UserWarning, match='near chance') as ws: fit(digits_learner(few), cbs=KD(Wrap(net, lambda o: o.roll(3, 1))))
        assert any('vocab' in str(w.message) and 'stats' in str(w.message) for w in ws)

    def test_good_teacher_does_not_warn(self, few, net):
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            fit(digits_learner(few), cbs=KD(net))
        assert not any('teacher' in str(w.message) for w in ws)

    @pytest.mark.parametrize('task,c', [('traits',4),('center',3)])
    def test_other_shape(self, tmp_path, task, c):
        learn = learner(digits_dls(64, task=task), tmp_path)
        t = tiny_cnn((4,), c=c)
        msg = refused_later(learn, lambda: KD(t), t)
        assert 'shape' in msg and f'{c})' in msg

def refused_later(learn, make, *models):
    "Refused at the first batch: batch norm has seen it, no step was taken"
    was = state(learn, *models)
    ps = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises((ValueError,TypeError)) as e: fit(learn, 2, cbs=make())
    now = state(learn, *models)
    for k in was:
        if k!='student': assert now[k]==was[k], k
    assert all(torch.equal(a, b) for a,b in zip(ps, learn.model.parameters()))
    fit(learn)
    return str(e.value)

# ---------------------------------------------------------------- what the teacher answers
class TestAnswers:
    @at
    def test_probabilities(self, learn, net, at):
        t = Wrap(net, lambda o: o.softmax(1))
        refused(ValueError, ['probabilities','logits','Teacher(model, output='], learn, lambda: KD(t), t, at=at)

    def test_way_out_of_probabilities(self, few, net):
        seen = []
        class See(Callback):
            order,run_valid = KD.order+.5,False
            def after_loss(self):
                with torch.no_grad(): seen.append((self.learn.loss.item(),kd_loss(self.learn.pred, net.eval()(*self.learn.xb), T=2.).item()))
        fit(digits_learner(few), cbs=[KD(Teacher(Wrap(net, lambda o: o.softmax(1)), output=lambda p: p.clamp_min(1e-8).log()), alpha=1, T=2.), See()])
        np.testing.assert_allclose(*zip(*seen), rtol=1e-3)

    def test_sigmoid(self, tmp_path):
        learn,t = learner(digits_dls(64, task='traits'), tmp_path),Wrap(tiny_cnn((4,), c=3), torch.sigmoid)
        refused(ValueError, ['probabilities','sigmoid','torch.logit'], learn, lambda: KD(t), t)

    def test_probabilities_per_pixel(self, tmp_path):
        learn,t = learner(digits_dls(64, task='ink'), tmp_path),Wrap(tiny_cnn((4,), c=3, dense=True), lambda o: o.softmax(1))
        refused(ValueError, ['probabilities','softmax'], learn, lambda: KD(t), t)

    @at
    @pytest.mark.parametrize('bad', [float('nan'),float('inf'),-float('inf')])
    def test_not_finite(self, few, tmp_path, net, bad, at):
        "Names the epoch and the batch; the step is not taken"
        learn = learner(few, tmp_path)
        calls,before = [],{}
        def f(o):
            calls.append(len(o))
            # preflight, then two batches an epoch: this is the second batch of the second epoch
            if len(calls)<5: return o
            before['w'] = [p.detach().clone() for p in learn.model.parameters()]
            o = o.clone()
            o[1,2] = bad
            return o
        t,kd = Wrap(net, f),None
        kd = KD(t)
        was = state(learn, t)
        if at=='init': learn.add_cb(kd)
        with pytest.raises(ValueError) as e: fit(learn, 3, cbs=kd if at=='fit' else None)
        for o in ('batch 1 of epoch 1','1 of 640','not finite','dtype=torch.float32'): assert o in str(e.value)
        assert all(torch.equal(a, b) for a,b in zip(before['w'], learn.model.parameters()))
        if at=='init': was['cbs'].append(id(kd))
        now = state(learn, t)
        for k in was:
            if k!='student': assert now[k]==was[k], k

    def test_large_is_finite(self, few, net):
        "Large logits are logits"
        fit(digits_learner(few), cbs=KD(Wrap(net, lambda o: o*1e36+1e37), alpha=0.5, loss='hard'))

    @at
    @pytest.mark.parametrize('f,says', [(lambda o: (o,o[:,:3]), ['tuple','(599, 10)','(599, 3)']), (lambda o: {'a':o,'b':o}, ['dict',"'a'","'b'"]), (lambda o: [o,o], ['list'])])
    def test_several_outputs(self, learn, net, f, says, at):
        t = Wrap(net, f)
        refused(ValueError, [*says,'Teacher(model, output='], learn, lambda: KD(t), t, at=at)

    def test_wrong_selector(self, learn, net):
        t = Wrap(net, lambda o: {'a':o,'b':o})
        refused(ValueError, ["'c'","'a'"], learn, lambda: KD(Teacher(t, output='c')), t)

    def test_several_outputs_of_the_student(self, few, tmp_path, net):
        "Not DeiT's two: which one is not said"
        class Two(nn.Module):
            def __init__(self): super().__init__(); self.m = tiny_cnn()
            def forward(self, x): return self.m(x),x.flatten(1)
        learn = Learner(few, Two(), loss_func=lambda p, y: F.cross_entropy(p[0], y), path=tmp_path)
        msg = refused_later(learn, lambda: KD(net, KDLoss()), net)
        assert 'the student' in msg and 'pred_kd' in msg and '(64, 10)' in msg
        fit(learn, cbs=KD(net, KDLoss(), pred_kd=0))

    def test_no_known_loss(self, few, tmp_path, net):
        learn = Learner(few, tiny_cnn(), loss_func=lambda p, y: F.cross_entropy(p, y), path=tmp_path)
        refused(ValueError, ['no response loss is known','KDLoss()'], learn, lambda: KD(net), net)

    def test_loss_without_reduction(self, learn, net):
        msg = refused_later(learn, lambda: KD(net, KDLoss(reduction='none')), net)
        assert 'one number' in msg and 'mean' in msg

# ---------------------------------------------------------------- the teacher itself
class TestTheTeacher:
    @at
    def test_same_object(self, learn, at): refused(ValueError, ['share weights','copy.deepcopy'], learn, lambda: KD(learn.model), at=at)
    def test_same_learner(self, learn): refused(ValueError, ['share weights','copy.deepcopy'], learn, lambda: KD(learn))
    def test_shared_layer(self, learn): refused(ValueError, 'share weights', learn, lambda: KD(nn.Sequential(*learn.model[:-1], nn.Linear(16,10))))
    def test_in_a_list(self, learn, net): refused(ValueError, 'share weights', learn, lambda: KD([net,learn.model]), net)
    def test_copy_is_fine(self, learn): fit(learn, cbs=KD(copy.deepcopy(learn.model), log=False))

    def test_moved(self, few, net):
        "To the device of the student, before it is asked"
        order = []
        class Moves(Wrap):
            def to(self, *args, **kwargs):
                order.append(args)
                return super().to(*args, **kwargs)
            def forward(self, *x):
                order.append('asked')
                return super().forward(*x)
        fit(digits_learner(few), cbs=KD(Moves(net, noop)))
        assert order[0]==(torch.device('cpu'),) and 'asked' in order

    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a second device')
    def test_moved_to_cuda(self, net):
        dls = digits_dls(128).to('cuda')
        learn = digits_learner(dls)
        learn.model.cuda()
        fit(learn, cbs=KD(net.cpu()))
        assert first(net.parameters()).is_cuda

    def test_none(self, learn): refused(ValueError, ['there is no teacher','KnowledgeDistillation(teacher)','store.attach(dls)'], learn, KD)
    @pytest.mark.parametrize('o,says', [(nn.Linear,'the class Linear: pass an instance'), (3,'3'), ({'a':1},"{'a': 1}"), (tiny_cnn,'tiny_cnn')])
    def test_not_a_model(self, learn, o, says): refused(TypeError, [says,'a teacher is a Learner'], learn, lambda: KD(o))
    def test_empty_list(self, learn): refused(ValueError, 'at least one teacher', learn, lambda: KD([]))

class TestFiles:
    def test_missing(self, learn, tmp_path):
        refused(FileNotFoundError, ['nothing.pkl','learn.export'], learn, lambda: KD(tmp_path/'nothing.pkl'))
        refused(FileNotFoundError, 'nothing.pkl', learn, lambda: KD(str(tmp_path/'nothing.pkl')))

    @pytest.mark.filterwarnings('ignore:.*is a pickle')
    @pytest.mark.parametrize('content', [b'', b'no pickle', pickle.dumps({'a':1})])
    def test_corrupt(self, learn, tmp_path, content):
        f = tmp_path/'t.pkl'
        f.write_bytes(content)
        refused(ValueError, ['t.pkl','export of a Learner','model=arch'], learn, lambda: KD(f))
        assert f.read_bytes()==content

    @pytest.mark.filterwarnings('ignore:.*is a pickle')
    def test_cut_off(self, learn, teach, tmp_path):
        f = tmp_path/'t.pkl'
        teach.export(f)
        f.write_bytes(f.read_bytes()[:-5000])
        refused(ValueError, ['t.pkl','could not be read'], learn, lambda: KD(f))

    @pytest.mark.filterwarnings('ignore:.*is a pickle')
    def test_weights_only(self, learn, teach, tmp_path):
        "A file of weights is not an export: the way out works"
        f = tmp_path/'t.pth'
        torch.save(teach.model.state_dict(), f)
        refused(ValueError, ['t.pth','model=arch'], learn, lambda: KD(f))
        fit(learn, cbs=KD(Teacher.from_file(f, model=tiny_cnn((8,16,32)))))

    def test_good(self, learn, teach, tmp_path):
        f = tmp_path/'t.pkl'
        teach.export(f)
        with pytest.warns(UserWarning, match='only files you trust'): fit(learn, cbs=KD(f))

# ---------------------------------------------------------------- numbers and names
class TestNumbers:
    @pytest.mark.parametrize('a', [-.1,1.1,float('nan'),float('inf'),2])
    def test_alpha(self, learn, net, a): refused(ValueError, ['`alpha`','between 0 and 1',str(a)], learn, lambda: KD(net, alpha=a), net)
    @pytest.mark.parametrize('a', ['.5',[.5],None])
    def test_alpha_type(self, learn, net, a): refused(TypeError, ['`alpha`',repr(a)], learn, lambda: KD(net, alpha=a), net)

    @at
    def test_alpha_schedule(self, learn, net, at):
        "Refused where it leaves the range"
        kd = KD(net, alpha=SchedLin(.8,1.6))
        if at=='init': learn.add_cb(kd)
        was = state(learn, net)
        with pytest.raises(ValueError, match='`alpha` must be between 0 and 1, got 1.2'): fit(learn, 2, cbs=kd if at=='fit' else None)
        now = state(learn, net)
        for k in was:
            if k!='student': assert now[k]==was[k], k

    def test_alpha_schedule_at_once(self, learn, net):
        "A schedule that starts outside"
        assert '`alpha`' in refused_later(learn, lambda: KD(net, alpha=SchedLin(1.5,.5)), net)

    @pytest.mark.parametrize('T', [0,-1,float('nan')])
    def test_T(self, learn, net, T):
        refused(ValueError, ['`T`','greater than 0',str(T)], learn, lambda: KD(net, T=T), net)
    def test_T_infinite(self, learn, net):
        "T²·0 is not a number"
        with pytest.raises(ValueError, match='`T`'): fit(learn, cbs=KD(net, T=float('inf')))
    def test_T_type(self, learn, net): refused(TypeError, ['`T`',"'4'"], learn, lambda: KD(net, T='4'), net)
    def test_T_schedule(self, learn, net):
        refused(ValueError, ['`T`','greater than 0'], learn, lambda: KD(net, T=SchedLin(0,4)), net)
    def test_T_schedule_later(self, learn, net):
        with pytest.raises(ValueError, match='`T` must be greater than 0'): fit(learn, 2, cbs=KD(net, T=SchedLin(2,-2)))
        assert learn.metrics.map(lambda m: m.name)==['accuracy']
    def test_T_of_the_loss(self, learn, net): assert '`T`' in refused_later(learn, lambda: KD(net, KDLoss(T=0)), net)

    @at
    @pytest.mark.parametrize('loss', ['hard',HardKDLoss(),MSELogitsLoss()])
    def test_T_without_use(self, learn, net, loss, at): refused(ValueError, ['`T` was given','no temperature'], learn, lambda: KD(net, loss, T=3.), net, at=at)
    def test_T_for_regression(self, tmp_path):
        learn,t = learner(digits_dls(64, task='center'), tmp_path),tiny_cnn((4,), c=2)
        refused(ValueError, ['`T` was given','MSELogits'], learn, lambda: KD(t, T=3.), t)

    @pytest.mark.parametrize('w', [-1,float('nan'),float('inf')])
    def test_task_weight(self, learn, net, w): refused(ValueError, ['`task_weight`',str(w)], learn, lambda: KD(net, task_weight=w), net)

    @pytest.mark.parametrize('kw,says', [(dict(start=-.1),'`start`'), (dict(stop=1.5),'`stop`'), (dict(start=-1),'`start`'), (dict(start=.6, stop=.4),'before `stop`'), (dict(start=.5, stop=.5),'before `stop`'), (dict(start=3, stop=2),'before `stop`'),
        (dict(start=float('nan')),'`start`'), (dict(stop=float('nan')),'`stop`'), (dict(stop=0),'`stop`')])
    def test_window(self, learn, net, kw, says): refused(ValueError, [says,*[str(v) for v in kw.values()]], learn, lambda: KD(net, **kw), net)
    @pytest.mark.parametrize('kw', [dict(start='1'), dict(stop=None), dict(start=True), dict(stop=[1])])
    def test_window_type(self, learn, net, kw):
        (k,v), = kw.items()
        refused(TypeError, [f'`{k}`','fraction','epoch',repr(v)], learn, lambda: KD(net, **kw), net)

class TestLossNames:
    @pytest.mark.parametrize('name,near', [('kdd',"'kd'"), ('dkld',"'dkd'"), ('mse','mse_logits'), ('KD','list_losses()')])
    def test_unknown(self, learn, net, name, near): refused(ValueError, [repr(name),near,'list_losses()'], learn, lambda: KD(net, name), net)
    def test_far(self, learn, net): assert 'Did you mean' not in refused(ValueError, 'list_losses()', learn, lambda: KD(net, 'zzzz'), net)
    @pytest.mark.parametrize('o', [KDLoss,3,['kd']])
    def test_not_a_loss(self, learn, net, o): refused(TypeError, ['a loss is a registered name','KDLoss()'], learn, lambda: KD(net, o), net)
    def test_unknown_argument(self, learn, net): refused(TypeError, 'temperature', learn, lambda: KD(net, temperature=4), net)

    def test_two(self, learn, net): refused(ValueError, ['two KnowledgeDistillation','WeightedSum','list of teachers'], learn, lambda: [KD(net),KD(net, 'hard')], net)
    def test_two_of_the_learner(self, learn, net): refused(ValueError, 'two KnowledgeDistillation', learn, lambda: [KD(net),KD(net, 'hard')], net, at='init')
    def test_one_of_each(self, learn, net):
        learn.add_cb(KD(net))
        was = state(learn, net)
        with pytest.raises(ValueError, match='two KnowledgeDistillation'): fit(learn, cbs=KD(net))
        assert state(learn, net)==was
        fit(learn)
    def test_the_same_twice(self, learn, net):
        kd = KD(net)
        learn.add_cb(kd)
        with pytest.raises(ValueError, match='two KnowledgeDistillation'): fit(learn, cbs=kd)
        fit(learn)
        assert 'kd_loss' in learn.recorder.metric_names
    def test_with_mixup(self, learn, net):
        "Refused after MixUp has swapped the loss function"
        t = Wrap(net, lambda o: o.softmax(1))
        refused(ValueError, 'probabilities', learn, lambda: KD(t), t, cbs=[MixUp()])

# ---------------------------------------------------------------- without labels
class TestUnlabelled:
    def learner(self, few, tmp_path):
        x = torch.stack([few.train.after_item(o)[0] for o in few.train_ds])
        dl = DataLoader([(o,) for o in x], bs=64, num_workers=0)
        (tmp_path/'s').mkdir()
        set_seed(0)
        return Learner(DataLoaders(dl, dl), tiny_cnn(), loss_func=CrossEntropyLossFlat(), path=tmp_path/'s')

    @pytest.mark.parametrize('kw,w', [(dict(alpha=.5),'0.5'), (dict(alpha=0.),'1'), (dict(alpha=1, task_weight=.2),'0.2'), (dict(),'0.5'), (dict(alpha=1, start=1),'1')])
    def test_needs_alpha_one(self, few, tmp_path, net, kw, w):
        msg = refused_unlabelled(self.learner(few, tmp_path), lambda: KD(net, **kw), net)
        for o in ('no labels',f'(weight {w})','`alpha=1`'): assert o in msg

    def test_label_loss(self, few, tmp_path, net):
        "A loss that reads labels has none to read"
        msg = refused_unlabelled(self.learner(few, tmp_path), lambda: KD(net, 'dkd', alpha=1), net)
        assert 'label' in msg

    def test_works(self, few, tmp_path, net):
        learn = self.learner(few, tmp_path)
        was = [p.detach().clone() for p in learn.model.parameters()]
        fit(learn, 2, cbs=KD(net, alpha=1))
        assert not any(torch.equal(a, b) for a,b in zip(was, learn.model.parameters()))
        assert learn.get_preds()[0].shape==(128,10)

def refused_unlabelled(learn, make, *models):
    was,ps = state(learn, *models),[p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError) as e: fit(learn, 2, cbs=make())
    now = state(learn, *models)
    for k in was:
        if k!='student': assert now[k]==was[k], k
    assert all(torch.equal(a, b) for a,b in zip(ps, learn.model.parameters()))
    return str(e.value)
