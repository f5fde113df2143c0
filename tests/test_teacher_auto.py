"`Teacher(dtype='auto')`: what it chooses is what it uses, and what changes the answers is refused"
import random,pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd import precision
from fastkd.test_utils import *
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(128)
good = digits_teacher(epochs=2, widths=(8,16,32))
x = dls.valid.one_batch()[0].as_subclass(Tensor)

class Large(nn.Module):
    "Its logits go by way of numbers around 1000, of which bfloat16 keeps three digits"
    def __init__(self, m):
        super().__init__()
        self.m,self.up,self.down = m,nn.Linear(10,10),nn.Linear(10,10)
        for l,b in ((self.up,1000.),(self.down,-1000.)): nn.init.eye_(l.weight); nn.init.constant_(l.bias, b)
    def forward(self, x): return self.down(self.up(self.m(x)))

class Notes(nn.Module):
    "Notes in which precision it runs"
    def __init__(self, m): super().__init__(); self.m,self.seen = m,[]
    def forward(self, x):
        z = self.m(x)
        self.seen.append((torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32, z.dtype))
        return z

def fast(monkeypatch, *names):
    "Let these ways take half the time, whatever the machine"
    monkeypatch.setattr(precision, '_times', lambda ask, hows, xb, n=5: [.4 if precision._name(o) in names else 1. for o in hows])

class TestChoice:
    @pytest.mark.parametrize('name,dtype,cl', [('bfloat16',torch.bfloat16,False), ('bfloat16+channels_last',torch.bfloat16,True), ('float32+channels_last',torch.float32,True), ('none',torch.float32,False)])
    def test_is_used(self, monkeypatch, capsys, name, dtype, cl):
        fast(monkeypatch, name)
        m = Notes(deepcopy(good.model))
        t = Teacher(m, dtype='auto').bind(digits_learner(dls))
        said = capsys.readouterr().out
        want = name if name!='none' else 'float32'
        assert said.startswith(f'teacher on cpu: {want}. Against float32: ') and said.count('\n')==1 and 'largest logit difference' in said and 'agrees on 100.0%' in said
        m.seen.clear()
        z = t(x)
        assert m.seen[0][0]==dtype and z.dtype==dtype
        assert m.m[1][0].weight.is_contiguous(memory_format=torch.channels_last)==cl
        # the answer is that of the precision by hand
        torch.testing.assert_close(z, Teacher(m, dtype=dtype, channels_last=cl).bind(digits_learner(dls))(x), rtol=0, atol=0 if cl is False else 1e-2)

    def test_what_breaks_is_refused(self, monkeypatch, capsys):
        fast(monkeypatch, 'bfloat16', 'bfloat16+channels_last')
        t = Teacher(Large(good.model), dtype='auto').bind(digits_learner(dls))
        said = capsys.readouterr().out
        assert said.startswith('teacher on cpu: float32.') and said.count('not the same: refused')==2
        assert t.report.loc['bfloat16','agree']<.99 and t.report.loc['bfloat16','sd']>.1
        assert t(x).dtype==torch.float32

    def test_agreement_alone_is_not_enough(self, monkeypatch):
        "The same classes, but other logits"
        class Blurred(nn.Module):
            def forward(self, x):
                z = x.new_zeros(len(x), 10)
                z[:,0] = 10.
                return z*(.8 if torch.is_autocast_enabled('cpu') else 1.)
            def __init__(self): super().__init__(); self.p = nn.Linear(1, 1)
        fast(monkeypatch, 'bfloat16')
        t = Teacher(Blurred(), dtype='auto').bind(digits_learner(dls))
        assert t.report.loc['bfloat16','agree']==1 and abs(t.report.loc['bfloat16','diff']-2)<1e-6 and t._how.dtype==torch.float32

    def test_what_is_not_finite_is_refused(self, monkeypatch):
        class Overflows(nn.Module):
            def __init__(self): super().__init__(); self.m = good.model
            def forward(self, x): return self.m(x)*(float('inf') if torch.is_autocast_enabled('cpu') else 1.)
        fast(monkeypatch, 'bfloat16')
        t = Teacher(Overflows(), dtype='auto').bind(digits_learner(dls))
        assert t._how.dtype==torch.float32 and t.report.loc['bfloat16','diff']==float('inf')

    def test_slower_is_not_chosen(self, monkeypatch):
        monkeypatch.setattr(precision, '_times', lambda ask, hows, xb, n=5: [1.]+[.97]*(len(hows)-1))
        assert Teacher(good, dtype='auto').bind(digits_learner(dls))._how==precision.Numerics()

    def test_compile(self, monkeypatch, capsys):
        "A compiled version is one more to try; what cannot be compiled is none; layers that are looked at run as they are"
        calls = []
        class Compiled(nn.Module):
            def __init__(self, m): super().__init__(); self.m = m
            def forward(self, x): calls.append(1); return self.m(x)
        monkeypatch.setattr(torch, 'compile', Compiled)
        fast(monkeypatch, 'float32+compile')
        learn = digits_learner(dls)
        t = Teacher(deepcopy(good.model), dtype='auto', compile=True).bind(learn)
        assert 'teacher on cpu: float32+compile.' in capsys.readouterr().out
        calls.clear(); a = t(x); assert len(calls)==1
        with Taps(t.model, ['1']) as taps: b = t(x); assert len(taps.take())==1
        assert len(calls)==1 and torch.equal(a, b)
        def broken(m): raise RuntimeError('no compiler here')
        monkeypatch.setattr(torch, 'compile', broken)
        t = Teacher(deepcopy(good.model), dtype='auto', compile=True).bind(learn)
        assert 'float32+compile cannot run (RuntimeError: no compiler here)' in capsys.readouterr().out and t._how==precision.Numerics()
        t = Teacher(deepcopy(good.model), dtype='auto').bind(learn)
        assert 'compile' not in capsys.readouterr().out

    @pytest.mark.parametrize('task', ['traits','center','ink'])
    def test_tasks(self, monkeypatch, task):
        "Labels of yes and no, values, a class per pixel"
        d = digits_dls(64, task=task)
        learn,m = digits_learner(d),tiny_cnn((8,16), get_c(d), dense=task=='ink').eval()
        fast(monkeypatch, 'bfloat16')
        kind = {'traits':'binary', 'center':'regress', 'ink':'softmax'}[task]
        t = Teacher(m, dtype='auto').bind(learn, kind)
        xs = torch.cat([b[0][0] for b in some_batches(learn)])
        with torch.no_grad():
            ref = m(xs)
            with torch.autocast('cpu', torch.bfloat16): got = m(xs).float()
        r = t.report.loc['bfloat16']
        says = {'binary':lambda z: z>0, 'regress':torch.zeros_like, 'softmax':lambda z: z.argmax(1)}[kind]
        assert r.agree==pytest.approx((says(ref)==says(got)).float().mean().item(), abs=1e-6)
        assert r['diff']==pytest.approx((ref-got).abs().max().item(), rel=1e-3) and r.sd==pytest.approx((ref-got).abs().max().item()/ref.std(correction=0).item(), rel=1e-3)

class TestAround:
    def test_nothing_else_changes(self, monkeypatch):
        "Random numbers, the student, the order of its batches, the teacher's modes and weights"
        fast(monkeypatch, 'bfloat16+channels_last')
        m = deepcopy(good.model).train()
        m[0].eval()
        learn = digits_learner(dls)
        was = [p.clone() for p in (*learn.model.state_dict().values(),*m.state_dict().values())]
        modes = [o.training for o in (*learn.model.modules(),*m.modules())]
        rng = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist(),dls.train.rng.getstate()
        t = Teacher(m, dtype='auto').bind(learn)
        assert (random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist(),dls.train.rng.getstate())==rng
        assert not m[1][0].weight.is_contiguous()
        t.release()
        assert all(p.is_contiguous() for p in m.parameters())
        t.bind(learn)
        assert not m[1][0].weight.is_contiguous()
        t.release()
        assert [o.training for o in (*learn.model.modules(),*m.modules())]==modes
        for a,b in zip(was, (*learn.model.state_dict().values(),*m.state_dict().values())): assert torch.equal(a, b)
        assert all(p.requires_grad for p in m.parameters())

    def test_once_for_the_same_data(self, monkeypatch, capsys):
        fast(monkeypatch, 'bfloat16')
        m = Notes(good.model)
        learn,t = digits_learner(dls),Teacher(m, dtype='auto')
        for _ in range(2):
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(t))
        assert capsys.readouterr().out.count('teacher on')==1
        t.bind(digits_learner(digits_dls(64)))
        assert capsys.readouterr().out.count('teacher on')==1
        assert t(x).dtype==torch.bfloat16

    def test_loss_of_a_batch(self, monkeypatch):
        "In a fit, the loss is that of the student and the teacher in bfloat16"
        fast(monkeypatch, 'bfloat16')
        learn,seen = digits_learner(dls),{}
        class Spy(Callback):
            order,run_valid = 100,False
            def after_loss(self): seen.update(x=self.x, y=self.y, z=self.pred, loss=self.learn.loss_grad.item()); raise CancelFitException
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KnowledgeDistillation(Teacher(good, dtype='auto'), T=2., alpha=.5),Spy()])
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): zt = good.model.eval()(seen['x'].as_subclass(Tensor))
        zt,z = zt.float(),seen['z'].as_subclass(Tensor)
        want = .5*F.cross_entropy(z, seen['y'])+.5*4*(F.softmax(zt/2, 1)*(F.log_softmax(zt/2, 1)-F.log_softmax(z/2, 1))).sum(1).mean()
        assert abs(seen['loss']-want.item())<1e-5

    def test_precompute(self, monkeypatch, tmp_path):
        "A store of answers is filled in the precision that was chosen; the parity of another choice lets it go on"
        fast(monkeypatch, 'bfloat16')
        t = Teacher(good, dtype='auto')
        s = precompute_targets(t, dls, tmp_path/'a', bar=noop)
        fast(monkeypatch)
        assert len(precompute_targets(Teacher(good, dtype='auto'), dls, tmp_path/'a', bar=noop))==len(s)

    def test_ensemble(self, monkeypatch, capsys):
        fast(monkeypatch, 'bfloat16')
        e = Ensemble([Teacher(good, dtype='auto'),Teacher(Large(good.model), dtype='auto')]).bind(digits_learner(dls))
        assert [p._how.dtype for p in e.parts]==[torch.bfloat16,torch.float32]

    def test_recurrent(self, monkeypatch):
        "Each try starts from an empty state"
        class Rnn(nn.Module):
            def __init__(self): super().__init__(); self.m,self.h = good.model,0.
            def reset(self): self.h = 0.
            def forward(self, x): self.h = self.h+self.m(x).mean().item(); return self.m(x)+self.h,x
        fast(monkeypatch, 'bfloat16')
        t = Teacher(Rnn(), dtype='auto').bind(digits_learner(dls))
        assert t._how.dtype==torch.bfloat16

    def test_a_format_of_its_own(self, monkeypatch, capsys):
        "A model that is in channels-last stays in it"
        fast(monkeypatch, 'bfloat16')
        m = deepcopy(good.model).to(memory_format=torch.channels_last)
        t = Teacher(m, dtype='auto').bind(digits_learner(dls))
        assert t._how.dtype==torch.bfloat16 and 'channels_last' not in capsys.readouterr().out
        t.release()
        assert not m[1][0].weight.is_contiguous()

class TestBadInput:
    @pytest.mark.parametrize('dtype', ['bf16','float16',torch.int64,16])
    def test_dtype(self, dtype):
        with pytest.raises(TypeError, match="floating point type, 'auto' or None"): Teacher(good, dtype=dtype)
    def test_other_inputs(self):
        "A teacher that cannot run on the batch is named by the checks before training"
        learn = digits_learner(dls)
        for m,msg in ((tiny_cnn(ch=3),r"cannot run on the student's inputs \[\(\d+, 1, 8, 8\)\]"), (TwoInputs(),"cannot run on the student's inputs")):
            with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=msg): learn.fit(1, cbs=KnowledgeDistillation(Teacher(m, dtype='auto')))
    def test_teacher_that_learns(self):
        learn = digits_learner(dls)
        with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match="`dtype='auto'` chooses how a model answers"): learn.fit(1, cbs=KnowledgeDistillation(Teacher(deepcopy(good.model), dtype='auto'), teacher_weight=1.))
    def test_labels_the_loss_cannot_take(self):
        "A regression's targets for a loss of classes: refused before the first step"
        learn = digits_learner(digits_dls(64, task='center'))
        before = [p.clone() for p in learn.model.parameters()]
        with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='integer labels'): learn.fit(1, cbs=KnowledgeDistillation(tiny_cnn(c=2), 'nkd'))
        assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(1, 1)
    def forward(self, a, b): return a+b
