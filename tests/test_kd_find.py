"`kd_find`: each number against a loop or a formula, and that nothing is left behind"
import pytest,torch
from fastai.text.all import *
from fastai.vision.all import *
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
from sklearn.datasets import load_digits
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

one = digits_dls(32, bs=32)
teacher = digits_teacher(epochs=1, widths=(8,16,32))
Ts,alphas = (1.,3.,10.),(.2,.5,1.)
def find(learn, t=teacher, Ts=Ts, alphas=alphas, n=None, show=False, **kw): return kd_find(learn, t, Ts=Ts, alphas=alphas, n=n, show=show, **kw)
def items(dls): return [o.as_subclass(Tensor) for o in to_cpu(next(iter(dls.train.new(shuffle=False))))]
def answers(learn, t=teacher, x=None):
    "Both sides' logits: the student's as it trains, of a copy"
    x = ifnone(x, items(learn.dls)[0])
    with torch.no_grad(): return deepcopy(learn.model).train()(x),t.model.eval()(x)
def close(a, b, tol=1e-4): np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tol, atol=tol)
def shares(g_task, g_kd, alphas):
    g_task,g_kd = float(g_task),float(g_kd)
    return [a*g_kd/(a*g_kd+(1-a)*g_task) for a in alphas]

class TestNumbers:
    def test_softmax_loop(self):
        learn = digits_learner(one)
        r = find(learn)
        z,t = answers(learn)
        y = items(one)[1]
        for T in Ts:
            ent,mar,kd,task = 0.,0.,0.,0.
            for i in range(32):
                q,p = [math.exp(v/T) for v in t[i].tolist()],[math.exp(v/T) for v in z[i].tolist()]
                q,p = [v/sum(q) for v in q],[v/sum(p) for v in p]
                ent -= sum(v*math.log(v) for v in q)/math.log(10)/32
                mar += (sorted(q)[-1]-sorted(q)[-2])/32
                kd += sum((T*(a-b)/32)**2 for a,b in zip(p, q))
                h = [math.exp(v) for v in z[i].tolist()]
                task += sum(((v/sum(h)-(k==int(y[i])))/32)**2 for k,v in enumerate(h))
            close(r.by_T.loc[T], [ent,mar,(kd/task)**.5])
            close(r.share.loc[T], shares(task**.5, kd**.5, r.share.columns))
        close(r.teacher['right, training'], (t.argmax(1)==y).float().mean())
        assert r.teacher['items']==r.teacher['labelled']==32

    def test_autograd(self):
        "Against the gradients of the real losses, label smoothing and class weights included"
        y = items(one)[1]
        for lf in (LabelSmoothingCrossEntropyFlat(), CrossEntropyLossFlat(weight=torch.arange(1.,11))):
            learn = digits_learner(one, loss_func=lf)
            r = find(learn)
            z,t = answers(learn)
            z.requires_grad_()
            a, = torch.autograd.grad(lf(z, y), z)
            for T in Ts:
                b, = torch.autograd.grad(KDLoss(T=T)(z, t), z)
                close(r.share.loc[T], shares(a.norm(), b.norm(), r.share.columns))

    def test_shares_are_those_of_training(self):
        "The first step, whose share `log='grad'` measures"
        learn = digits_learner(one)
        r = find(learn, alphas=(.3,))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=KnowledgeDistillation(teacher, T=3., alpha=.3, log='grad'))
        close(fit_table(learn).kd_grad_share.iloc[-1], r.share.loc[3.,.3], 1e-3)

    def test_binary(self):
        dls = digits_dls(32, bs=32, task='traits')
        t,learn = digits_teacher(dls, epochs=3, widths=(8,16)),digits_learner(dls)
        r = find(learn, t)
        z,q = answers(learn, t)
        y = items(dls)[1]
        for T in Ts:
            p = torch.sigmoid(q/T).double()
            close(r.by_T.entropy[T], -(p*p.log2()+(1-p)*(1-p).log2()).mean())
            close(r.by_T.margin[T], (2*p-1).abs().mean())
            a,b = (z.sigmoid()-y).norm()/96,(T*((z/T).sigmoid()-(q/T).sigmoid())).norm()/96
            close(r.share.loc[T], shares(a, b, r.share.columns))
        close(r.teacher['right, training'], ((q>0)==(y>.5)).float().mean())
        assert r.teacher['labelled']==96

    def test_segmentation(self):
        "Only the pixels that count"
        dls = digits_dls(16, bs=16, task='ink')
        lf = CrossEntropyLossFlat(axis=1, ignore_index=0)
        t,learn = digits_teacher(dls, epochs=1, widths=(8,16)),digits_learner(dls, loss_func=lf)
        r = find(learn, t)
        z,q = answers(learn, t)
        y = items(dls)[1]
        rows = lambda o: o.movedim(1, -1)[y!=0]
        z,q,y = rows(z),rows(q),y[y!=0]
        for T in Ts:
            p = (q/T).softmax(1)
            close(r.by_T.entropy[T], torch.distributions.Categorical(p).entropy().mean()/math.log(3))
            a,b = (z.softmax(1)-F.one_hot(y, 3)).norm()/len(y),T*((z/T).softmax(1)-p).norm()/len(y)
            close(r.share.loc[T], shares(a, b, r.share.columns))
        close(r.teacher['right, training'], (q.argmax(1)==y).float().mean())
        assert r.teacher['labelled']==len(y)

    def test_several_batches(self):
        "Means over items, whatever the batches"
        a,b = find(digits_learner(one)),find(digits_learner(digits_dls(32, bs=10)))
        close(a.by_T[['entropy','margin']].values, b.by_T[['entropy','margin']].values)
        close(a.teacher.values, b.teacher.values)
        assert find(digits_learner(digits_dls(100, bs=10)), n=25).teacher['items']==30

    def test_scale(self):
        "Logits twice as large are as soft at twice the temperature"
        a = find(digits_learner(one), Ts=(2,4)).by_T
        b = find(digits_learner(one), Teacher(teacher, output=lambda z: 2*z), Ts=(4,8)).by_T
        close(a[['entropy','margin']].values, b[['entropy','margin']].values)

    def test_table_and_text(self):
        df = pd.DataFrame(dict(size=np.arange(40.), kind=['u','v']*20, label=['no','yes']*20))
        dls = TabularPandas(df, [Categorify,Normalize], ['kind'], ['size'], 'label', CategoryBlock(), splits=(L(range(32)),L(range(32,40)))).dataloaders(bs=32)
        class Knows(nn.Module):
            "The column that says it all"
            def forward(self, cat, cont): return 2.*F.one_hot(cat[:,0]-1, 2)
        r = find(tabular_learner(dls, layers=[4]), Knows())
        p = 1/(1+math.exp(-2/3))
        close(r.by_T.loc[3.,['entropy','margin']], [-(p*math.log2(p)+(1-p)*math.log2(1-p)),2*p-1])
        assert r.teacher.tolist()==[32,32,1,1]
        df = pd.DataFrame(dict(text=['one two','three four five']*8, label=['a','b']*8, is_valid=[False]*12+[True]*4))
        text = TextBlock.from_df('text', tok=BaseTokenizer(), rules=[], n_workers=0, min_freq=1)
        dls = DataBlock((text,CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'), splitter=ColSplitter()).dataloaders(df, bs=4, num_workers=0)
        learners = [text_classifier_learner(dls, AWD_LSTM, config={**awd_lstm_clas_config, 'emb_sz':4, 'n_hid':6, 'n_layers':1}, pretrained=False) for _ in range(2)]
        r = find(*learners)
        assert r.teacher['labelled']==12 and r.share.notna().all().all()

class TestSources:
    def test_store(self, tmp_path):
        store = precompute_targets(teacher, one, tmp_path/'s', bar=noop)
        live = find(digits_learner(one))
        runs = [find(digits_learner(one), store),find(digits_learner(one), tmp_path/'s'),find(digits_learner(store.attach(one)), None),find(digits_learner(store.attach(one)))]
        for r in runs:
            close(r.by_T.values, live.by_T.values, 5e-3)
            close(r.share.values, live.share.values, 5e-3)
        assert np.isnan(runs[0].teacher['right, validation']) and live.teacher['right, validation']>0

    def test_cache_is_not_filled(self, tmp_path):
        src = as_source(teacher, tmp_path/'c')
        close(find(digits_learner(one), src).by_T.values, find(digits_learner(one)).by_T.values)
        assert not (tmp_path/'c').exists()

    def test_sparse_is_refused(self, tmp_path):
        store = precompute_targets(teacher, one, tmp_path/'s', kind='sparse', T=4., k=4, bar=noop)
        with pytest.raises(ValueError, match='know one temperature, T=4'): find(digits_learner(one), store)

    def test_classes_by_name(self):
        "Another order, and classes that the teacher lacks"
        back = digits_dls(32, bs=32, vocab=[str(i) for i in reversed(range(10))])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            r = find(digits_learner(back))
            close(r.by_T[['entropy','margin']].values, find(digits_learner(one)).by_T[['entropy','margin']].values)
            assert r.teacher['right, training']==find(digits_learner(one)).teacher['right, training']
            some = Teacher(teacher.model, vocab=[str(i) for i in range(8)]+['x','z'], missing='ignore')
            r = find(learn:=digits_learner(one), some)
        z,t = answers(learn)
        y = items(one)[1]
        p = (t[:,:8]/3).softmax(1)
        close(r.by_T.entropy[3.], torch.distributions.Categorical(p).entropy().mean()/math.log(8))
        assert r.teacher['labelled']==(y<8).sum()
        a,b = (z.softmax(1)-F.one_hot(y, 10)).norm(),3*((z[:,:8]/3).softmax(1)-p).norm()
        close(r.share.loc[3.], shares(a, b, r.share.columns))

    def test_unlabelled(self):
        "Some items without a label, and all"
        db = DataBlock((TransformBlock,MaybeLabelled()), get_x=lambda o: tensor(o[0]).float()[None]/16, get_y=lambda o: o[1], splitter=EndSplitter(.2))
        d = load_digits()
        rows = [[x,str(y) if i>=20 else None] for i,(x,y) in enumerate(zip(d.images[:50], d.target[:50]))]
        dls = db.dataloaders(rows, bs=40, num_workers=0)
        learn = Learner(dls, tiny_cnn(c=len(dls.vocab)), loss_func=LabelledLoss())
        r = find(learn, teacher.model)
        assert (r.teacher['items'],r.teacher['labelled'])==(40,20)
        free = DataBlock((TransformBlock,), get_x=lambda o: tensor(o[0]).float()[None]/16, splitter=EndSplitter(.2)).dataloaders(rows, bs=40, num_workers=0)
        r = find(Learner(free, tiny_cnn(), loss_func=CrossEntropyLossFlat()), teacher.model)
        assert r.alpha==1 and (r.share==1).all().all() and r.teacher['labelled']==0 and any('no item has a label' in o for o in r.notes)

class TestNothingChanges:
    def test_state(self):
        learn,t = digits_learner(digits_dls(64, bs=16), cbs=KnowledgeDistillation(teacher)),deepcopy(teacher.model).train()
        t[1].eval()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        def state(): return dict(w=[o.clone() for m in (learn.model,t) for o in m.state_dict().values()], modes=[m.training for o in (learn.model,t) for m in o.modules()], opt=deepcopy(learn.opt.state_dict()),
            cbs=list(learn.cbs), metrics=list(learn.metrics), rng=learn.dls.train.rng.getstate(), py=random.getstate(), tr=torch.get_rng_state(), npr=np.random.get_state()[1].tolist(),
            grads=[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()], rec=list(learn.recorder.values), keys=sorted(vars(learn)), hooks=sum(len(m._forward_hooks) for m in learn.model.modules()))
        a = state()
        find(learn, t, n=20)
        b = state()
        flat = lambda o: [x for v in (o.values() if isinstance(o, dict) else o) for x in flat(v)] if isinstance(o, (dict,list,tuple)) else [o]
        for k in a:
            for x,y in zip(flat(a[k]), flat(b[k]), strict=True): assert torch.equal(x, y) if isinstance(x, Tensor) else x is y or x==y,k

    @pytest.mark.parametrize('stored', [False,True])
    def test_training_goes_on(self, stored, tmp_path):
        "A fit after it is the fit without it"
        def run(look):
            dls = digits_dls(64, bs=16)
            src = precompute_targets(teacher, dls, tmp_path/'s', bar=noop) if stored else teacher
            learn = digits_learner(dls)
            if look: find(learn, src, n=20)
            with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=KnowledgeDistillation(src))
            return fit_table(learn)
        assert run(True).equals(run(False))

    def test_after_an_error(self):
        class Breaks(nn.Module):
            def forward(self, x): raise RuntimeError('no')
        learn = digits_learner(one)
        state = one.train.rng.getstate(),torch.get_rng_state()
        with pytest.raises(ValueError, match="cannot run on the student's inputs"): find(learn, Breaks())
        assert one.train.rng.getstate()==state[0] and torch.equal(torch.get_rng_state(), state[1]) and find(learn)

    def test_again(self):
        learn = digits_learner(digits_dls(64, bs=16))
        a,b = find(learn, n=20),find(learn, n=20)
        assert a.by_T.equals(b.by_T) and a.share.equals(b.share)

class TestSuggestion:
    def test_rule(self):
        r = kd_find(digits_learner(one), Teacher(teacher, output=lambda z: z*6), show=False)
        assert r.T==max([T for T in r.by_T.index if .1<=r.by_T.entropy[T]<=.97 and T<=5]) and r.alpha==.5 and tuple(r)==(r.T,r.alpha) and r._asdict()==dict(T=r.T, alpha=.5)
        KnowledgeDistillation(teacher, **r._asdict())
        flat = kd_find(digits_learner(one), Teacher(teacher, output=lambda z: z/100), show=False)
        assert flat.T==1 and any('nearly flat' in o for o in flat.notes)
        hot = kd_find(digits_learner(one), Teacher(teacher, output=lambda z: z*30), show=False)
        assert hot.T==min((T for T in hot.by_T.index if .1<=hot.by_T.entropy[T]<=.97), key=lambda T: abs(math.log(T/5)))
        sharp = kd_find(digits_learner(one), Teacher(teacher, output=lambda z: z*100000), show=False)
        assert sharp.T==20 and any('look further up' in o for o in sharp.notes) and any('nearly what a label says' in o for o in sharp.notes)

    def test_wrong_labels(self):
        "The teacher contradicts the labels of training items alone"
        dls,good = digits_dls(64, bs=64),digits_teacher(epochs=6)
        ys = dls.train_ds.tls[1].items
        for i in range(0, 64, 2): ys[i] = [ys[i][0],(ys[i][1]+1)%10]
        r = kd_find(digits_learner(dls), good, show=False)
        assert r.alpha==.9 and any('labels may be wrong' in o for o in r.notes)

    def test_chance(self):
        set_seed(0)
        assert any('near chance' in o for o in kd_find(digits_learner(digits_dls(64)), tiny_cnn(), show=False).notes)

    def test_plot(self):
        r = find(digits_learner(one), show=True)
        axs = plt.gcf().axes
        assert [ax.get_title() for ax in axs]==['softened entropy','top-1 margin',"distillation's share of the gradient"]
        for ax,v in zip(axs, (r.by_T.entropy[r.T],r.by_T.margin[r.T],r.share.loc[r.T,r.alpha])):
            dot = ax.lines[-1]
            assert dot.get_marker()=='o' and list(dot.get_xdata())==[r.T] and list(dot.get_ydata())==[v]
        plt.close('all')

@pytest.mark.parametrize('kw,err,msg', [
    (dict(Ts=()),ValueError,'`Ts` must name'), (dict(Ts=(1,0)),ValueError,'greater than 0'), (dict(Ts='abc'),TypeError,'`T` must be a number'),
    (dict(alphas=(2,)),ValueError,'between 0 and 1'), (dict(alphas=('x',)),TypeError,'must be a number'), (dict(n=0),ValueError,'`n` must be'), (dict(n=True),ValueError,'`n` must be'),
    (dict(t=3),TypeError,'a teacher is'), (dict(t=EMATeacher()),ValueError,'changes as the student does'), (dict(t=nn.Sequential(tiny_cnn(), nn.Softmax(1))),ValueError,'probabilities'),
    (dict(t=tiny_cnn(c=7)),ValueError,'7 classes'), (dict(t=None),ValueError,'there is no teacher')])
def test_refused(kw, err, msg):
    with pytest.raises(err, match=msg): find(digits_learner(one), **kw)

def test_refused_tasks():
    dls = digits_dls(32, bs=32, task='center')
    with pytest.raises(ValueError, match='no temperature'): find(digits_learner(dls), digits_learner(dls))
    with pytest.raises(ValueError, match='needs a loss function of classes'): find(digits_learner(one, loss_func=DiceLoss()))
    with pytest.raises(TypeError, match="student's Learner"): find(teacher.model)
