"Student and teacher side by side: every number against a plain loop, on images, tables, texts and masks"
import contextlib,io,math,pytest,random,torch
from collections import Counter
from fastai.vision.all import *
from fastai.text.all import *
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import *
from sklearn.datasets import load_breast_cancer
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
warnings.filterwarnings('ignore')

def fitted(learn, n=1, lr=1e-2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr)
    return learn

def sided(s, t, **kwargs):
    with s.no_bar(): return DistillationInterpretation.from_learners(s, t, **kwargs)

@functools.lru_cache(None)
def digits():
    "A student and a teacher that answer 599 digits"
    s,t = fitted(digits_learner(digits_dls(150, bs=16)), 3),digits_teacher(digits_dls(300), epochs=3, widths=(8,16,32))
    return s,t,sided(s, t)

def table_dls(seed=0, n=200):
    df = load_breast_cancer(as_frame=True).frame.iloc[:n].copy()
    df['target'] = df.target.map({0:'bad', 1:'good'})
    df['size'] = pd.cut(df['mean area'], 3, labels=['s','m','l']).astype(str)
    return TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['size'], cont_names=['mean radius','mean texture','mean smoothness'],
        y_names='target', y_block=CategoryBlock(), valid_idx=list(range(seed, n, 4)), bs=32)

@functools.lru_cache(None)
def tables():
    dls = table_dls()
    set_seed(0)
    s,t = tabular_learner(dls, layers=[4], metrics=accuracy),fitted(tabular_learner(dls, layers=[20,10]), 3)
    fitted(s)
    return s,t,sided(s, t)

@functools.lru_cache(None)
def texts():
    rng,words = np.random.RandomState(0),'good fine great bad poor awful film plot actor'.split()
    rows = [rng.choice(words, rng.randint(3, 12)) for _ in range(60)]
    df = pd.DataFrame({'text':[' '.join(o) for o in rows], 'label':['pos' if sum(w in words[:3] for w in o)>=sum(w in words[3:6] for w in o) else 'neg' for o in rows], 'is_valid':[i%3==0 for i in range(60)]})
    set_seed(0)
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=7, seq_len=8)
    config = {**awd_lstm_clas_config, 'emb_sz':8, 'n_hid':8, 'n_layers':1}
    s,t = [text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, metrics=accuracy) for _ in range(2)]
    fitted(t, 2, .1)
    return s,t,sided(s, t)

class _Void(ItemTransform):
    "Some pixels of masks have no label"
    def encodes(self, o): return o if len(o)<2 else (o[0],TensorMask(torch.where(torch.rand(8,8, generator=torch.Generator().manual_seed(int(o[1].sum())))<.2, 255, o[1])))

def ink_dls(n=40, void=True):
    dls = digits_dls(n, task='ink', bs=16)
    if void:
        for dl in dls.loaders: dl.after_item.add(_Void())
    return dls

@functools.lru_cache(None)
def masks():
    lf = lambda: CrossEntropyLossFlat(axis=1, ignore_index=255)
    dls = ink_dls()
    s,t = [fitted(digits_learner(dls, w, metrics=[], loss_func=lf())) for w in ((3,),(8,))]
    return s,t,sided(s, t)

@functools.lru_cache(None)
def traits():
    s,t = [fitted(digits_learner(digits_dls(150, bs=16, task='traits'), w)) for w in ((4,8),(8,16,32))]
    return s,t,sided(s, t)

@functools.lru_cache(None)
def centers():
    s,t = [fitted(digits_learner(digits_dls(150, bs=16, task='center'), w)) for w in ((4,8),(8,16,32))]
    return s,t,sided(s, t)

def loop_logits(learn, dl=None):
    "Logits and labels item by item, in the order of the data set, with nothing of ours"
    dl = ifnone(dl, learn.dls.valid).new(shuffle=False, drop_last=False)
    idxs,zs,ys = list(dl.get_idxs()),[],[]
    learn.model.eval()
    with torch.no_grad():
        for b in dl:
            n = dl.n_inp
            if hasattr(learn.model, 'reset'): learn.model.reset()
            z = learn.model(*[o.as_subclass(Tensor) for o in b[:n]])
            zs.append((z[0] if isinstance(z, tuple) else z).as_subclass(Tensor))
            ys.append(b[n].as_subclass(Tensor))
    o = tensor(idxs).argsort()
    return torch.cat(zs)[o],torch.cat(ys)[o]

def probs(z):
    "Softmax of a list"
    m = max(z)
    e = [math.exp(v-m) for v in z]
    return [v/sum(e) for v in e]
def kl(zs, zt):
    p,q = probs(zt),probs(zs)
    return sum(a*math.log(a/b) for a,b in zip(p, q) if a>0)
def top(z): return max(range(len(z)), key=z.__getitem__)

def flat(z, y): return z.movedim(1, -1).reshape(-1, z.shape[1]).double().tolist(),y.reshape(-1).tolist()

def loop_table(zs, zt, ys, names, ignore=None):
    "The error table of plain lists"
    rows = {k:Counter() for k in names}
    for a,b,y in zip(zs, zt, ys):
        if y==ignore: continue
        r,s,t = rows[names[int(y)]],top(a)!=y,top(b)!=y
        for k,v in dict(items=True, student_wrong=s, teacher_wrong=t, inherited=s and t, same_answer=s and t and top(a)==top(b), corrected=t and not s, new=s and not t).items(): r[k] += v
    cols = 'items student_wrong teacher_wrong inherited same_answer corrected new'.split()
    res = [[rows[k][c] for c in cols] for k in names]
    return [*res,[sum(o) for o in zip(*res)]]

def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tol, atol=tol)

@functools.lru_cache(None)
def both_loops(nm):
    s,t,i = four[nm]()
    (zs,y),(zt,_) = loop_logits(s),loop_logits(t)
    return s,i,zs,zt,y.reshape(zs.shape[:1]+zs.shape[2:])

four = dict(digits=digits, tables=tables, texts=texts, masks=masks)

@pytest.mark.parametrize('nm', list(four))
class TestNumbers:
    @pytest.fixture
    def case(self, nm): return both_loops(nm)

    def test_answers(self, case, nm):
        s,i,zs,zt,y = case
        # a text of another length in the same batch changes nothing but the last digits
        close(i.student.logits, zs, 1e-4)
        close(i.teacher.logits, zt, 1e-4)
        assert i.student.targ.tolist()==y.tolist()

    def test_agreement(self, case, nm):
        s,i,zs,zt,y = case
        (a,ys),(b,_) = flat(zs, y),flat(zt, y)
        want = Counter((top(q),top(p)) for p,q,k in zip(a, b, ys) if k!=255)
        m = i.agreement_matrix()
        assert m.index.name=='teacher' and m.columns.name=='student' and list(m.index)==list(m.columns)==[str(o) for o in get_vocab(s.dls)]
        assert m.to_numpy().tolist()==[[want[r,c] for c in range(len(m))] for r in range(len(m))]

    def test_errors(self, case, nm):
        s,i,zs,zt,y = case
        (a,ys),(b,_) = flat(zs, y),flat(zt, y)
        t = i.error_table()
        assert t.to_numpy().tolist()==loop_table(a, b, ys, list(map(str, get_vocab(s.dls))), 255) and t.index[-1]=='all'

    def test_divergence(self, case, nm):
        s,i,zs,zt,y = case
        want = []
        for p,q,k in zip(zs, zt, y):
            (a,ys),(b,_) = flat(p[None], k),flat(q[None], k)
            v = [kl(*o) for *o,l in zip(a, b, ys) if l!=255]
            want.append(sum(v)/max(len(v), 1))
        close(i.disagreements, want, 1e-4)
        v,rows = i.top_disagreements(4)
        assert v.tolist()==sorted(i.disagreements.tolist(), reverse=True)[:4] and i.disagreements[rows].tolist()==v.tolist()
        assert i.top_disagreements(2, largest=False)[0].tolist()==sorted(i.disagreements.tolist())[:2]

    def test_reliability(self, case, nm):
        s,i,zs,zt,y = case
        plt.close('all')
        i.plot_reliability(n_bins=5)
        ax = plt.gca()
        for who,z,line,leg in zip(('student','teacher'), (zs,zt), ax.lines[1:], ax.get_legend().get_texts()):
            a,ys = flat(z, y)
            its = [(max(probs(o)),top(o)==k) for o,k in zip(a, ys) if k!=255]
            pts,err = [],0
            for b in range(5):
                o = [(p,r) for p,r in its if b/5<p<=(b+1)/5]
                if not o: continue
                pts.append([sum(p for p,_ in o)/len(o),sum(r for _,r in o)/len(o)])
                err += abs(sum(p-r for p,r in o))/len(its)
            close(line.get_xydata().tolist(), pts, 1e-4)
            assert leg.get_text().startswith(f'{who}, ECE ') and abs(float(leg.get_text()[-5:])-err)<1e-3

    def test_losses(self, case, nm):
        "The student's own, as fastai's interpretation has them, but in the order of the data set"
        s,i,zs,zt,y = case
        want = []
        for z,k in zip(zs, y):
            a,ys = flat(z[None], k)
            want.append(sum(-math.log(probs(o)[l]) if l!=255 else 0 for o,l in zip(a, ys))/len(ys))
        close(i.losses, want, 1e-4)

    def test_items(self, case, nm):
        "What is shown belongs to the answers beside it"
        s,i,zs,zt,y = case
        inp,preds,targs,dec,loss = i[[7,2,5]]
        assert targs.tolist()==y[[7,2,5]].tolist() and loss.tolist()==i.losses[[7,2,5]].tolist()
        close(preds, i.student.probs[[7,2,5]])
        assert dec.tolist()==i.student.pred[[7,2,5]].tolist()
        b = i._batch([7,2,5])
        assert b[-1].reshape(y[:3].shape).tolist()==y[[7,2,5]].tolist()
        with torch.no_grad(): z = s.model(*[o.as_subclass(Tensor) for o in b[:-1]])
        close((z[0] if isinstance(z, tuple) else z).as_subclass(Tensor), zs[[7,2,5]], 1e-4)

    def test_softened(self, case, nm):
        s,i,zs,zt,y = case
        at = (3,1,2) if nm=='masks' else 3
        z = [o[3,:,1,2] if nm=='masks' else o[3] for o in (zs,zt)]
        for T in (1,4.): close(i.softened(at, T).to_numpy(), list(zip(*[probs([v/T for v in o.double().tolist()]) for o in z])), 1e-4)
        plt.close('all')
        i.plot_softened([at], T=(1,4))
        axs = plt.gcf().axes
        assert [a.get_title() for a in axs]==['T = 1','T = 4']
        # bars of the student come first
        close([o.get_height() for o in axs[1].patches], i.softened(at, 4).T.to_numpy().flatten())

    def test_plots(self, case, nm, capsys):
        "All of fastai's own views and ours run, and leave the Learner alone"
        s,i,*_ = case
        plt.close('all')
        i.plot_agreement_matrix(), i.plot_agreement_matrix(normalize=True), i.plot_errors()
        m = i.agreement_matrix().to_numpy()
        assert [o.get_text() for o in plt.figure(1).axes[0].texts]==[str(v) for v in m.flatten()]
        assert [o.get_text() for o in plt.figure(2).axes[0].texts]==[f'{v/max(r.sum(), 1):.2f}' for r in m for v in r]
        i.plot_top_disagreements(3), i.plot_top_disagreements([2,0])
        # fastai has no `plot_top_losses` for tables, and its `show_results` for texts fails
        if nm!='texts': i.show_results([1,0])
        if nm!='tables': i.plot_top_losses(2)
        plt.close('all')

class TestShown:
    "What the pictures say is what the answers are"
    def test_images(self):
        s,t,i = digits()
        _,rows = i.top_disagreements(3)
        plt.close('all')
        i.plot_top_disagreements(3)
        for ax,r in zip(plt.gcf().axes, rows.tolist()):
            ps,pt = [probs(o.logits[r].double().tolist()) for o in (i.student,i.teacher)]
            img,y = s.dls.valid_ds[r]
            assert ax.get_title()=='\n'.join([f'target {i.vocab[y]}', f'student {top(ps)} ({max(ps):.2f})', f'teacher {top(pt)} ({max(pt):.2f})', f'divergence {i.disagreements[r]:.2f}'])
            assert np.allclose(np.asarray(ax.images[0].get_array()).squeeze(), img.squeeze().numpy())
    def test_ranks(self):
        "A list or range names ranks, as for `plot_top_losses`"
        i = digits()[2]
        _,rows = i.top_disagreements()
        plt.close('all')
        i.plot_top_disagreements(range(1,3))
        assert [o.get_title().split()[-1] for o in plt.gcf().axes]==[f'{i.disagreements[r]:.2f}' for r in rows[1:3]]
    def _frame(self, monkeypatch, i, k):
        got = []
        monkeypatch.setattr('fastkd.disagreements.display_df', got.append)
        i.plot_top_disagreements(k)
        return got[0]
    def test_table(self, monkeypatch):
        s,t,i = tables()
        o = self._frame(monkeypatch, i, 3)
        assert o.index.tolist()==i.top_disagreements(3)[1].tolist()
        raw = load_breast_cancer(as_frame=True).frame.iloc[:200].iloc[::4]
        assert np.allclose(o['mean radius'], raw['mean radius'].iloc[o.index], rtol=1e-4)
        assert o.target.tolist()==['good' if v else 'bad' for v in raw.target.iloc[o.index]]
        assert o.teacher.tolist()==[i.vocab[top(i.teacher.logits[r].tolist())] for r in o.index]
        assert o.student_prob.tolist()==[f'{max(probs(i.student.logits[r].double().tolist())):.2f}' for r in o.index]
    def test_text(self, monkeypatch):
        s,t,i = texts()
        o = self._frame(monkeypatch, i, 5)
        df,toks = s.dls.valid.items,s.dls.vocab[0]
        assert [v.replace('xxpad', '').strip() for v in o.input]==[' '.join(toks[w] for w in s.dls.valid_ds[r][0]) for r in o.index]
        assert o.target.tolist()==[df.iloc[r].label for r in o.index] and np.allclose(o.divergence, i.disagreements[o.index.tolist()])
    def test_masks(self):
        s,t,i = masks()
        got,y = i.disagreement_masks(range(20)),i.student.targ
        for r,m in enumerate(got):
            for h,w in itertools.product(range(8), range(8)):
                a,b,k = [top(o.logits[r,:,h,w].tolist()) for o in (i.student,i.teacher)]+[int(y[r,h,w])]
                assert m[h,w]==(255 if k==255 else 0 if a==b else 1 if a==k else 2 if b==k else 3)
        assert {255,0}<set(got.flatten().tolist())
        all_ = i.disagreement_masks(range(len(y)))
        share = [sum(0<v<255 for v in o)/sum(v<255 for v in o) for o in all_.flatten(1).tolist()]
        plt.close('all')
        i.plot_disagreement_masks(2)
        axs = [o for o in plt.gcf().axes]
        assert [o.get_title() for o in axs[4::5]]==[f'{v:.0%} differ' for v in sorted(share, reverse=True)[:2]]
        r = share.index(max(share))
        assert np.ma.getdata(axs[4].images[0].get_array()).tolist()==all_[r].tolist() and np.ma.getmaskarray(axs[1].images[0].get_array()).tolist()==(y[r]==255).tolist()
    def test_cka(self):
        s,t,i = digits()
        for st,tt in ((None,None),(['0','1'],['2'])):
            plt.close('all')
            i.plot_cka(st, tt)
            assert np.allclose(plt.gcf().axes[0].images[0].get_array(), cka_map(s, t, student_layers=st, teacher_layers=tt).to_numpy())

class TestSeveralLabels:
    def test_tables(self):
        s,t,i = traits()
        a,b,y = [o.tolist() for o in (i.student.logits,i.teacher.logits,i.student.targ)]
        m,e = i.agreement_matrix(),i.error_table()
        tot = []
        for l,nm in enumerate(('even','large','loop')):
            c = Counter((p[l]>0,q[l]>0) for p,q in zip(a, b))
            assert m.loc[nm].tolist()==[c[True,True],c[False,True],c[True,False],c[False,False]]
            w = Counter(((p[l]>0)!=k[l],(q[l]>0)!=k[l]) for p,q,k in zip(a, b, y))
            tot.append([len(a),w[True,True]+w[True,False],w[True,True]+w[False,True],w[True,True],w[False,True],w[True,False]])
        assert e.to_numpy().tolist()==[*tot,[sum(o) for o in zip(*tot)]] and list(e.columns)=='items student_wrong teacher_wrong inherited corrected new'.split()
    def test_divergence(self):
        i = traits()[2]
        sig = lambda v: 1/(1+math.exp(-v))
        def one(z, t):
            p,q = sig(t),sig(z)
            return p*math.log(p/q)+(1-p)*math.log((1-p)/(1-q))
        close(i.disagreements, [sum(map(one, a, b))/3 for a,b in zip(i.student.logits.double().tolist(), i.teacher.logits.double().tolist())])
        close(i.softened(5, 2.).teacher.to_numpy(), [sig(v/2) for v in i.teacher.logits[5].tolist()])
    def test_views(self):
        s,t,i = traits()
        plt.close('all')
        i.plot_top_disagreements(2)
        r = i.top_disagreements(1)[1].item()
        says = lambda v: '; '.join(n for n,o in zip(i.vocab, v.tolist()) if o)
        assert plt.gcf().axes[0].get_title().startswith(f'target {says(i.student.targ[r])}\nstudent {says(i.student.pred[r])} ({" ".join(f"{v:.2f}" for v in i.student.probs[r])})')
        i.plot_agreement_matrix(), i.plot_errors(), i.plot_reliability(), i.plot_softened([0]), i.plot_cka()
        plt.close('all')
        with pytest.raises(ValueError, match='one label each'): i.top_disagreements(2, among='new')

class TestValues:
    def test_regression(self):
        s,t,i = centers()
        close(i.disagreements, [sum((p-q)**2 for p,q in zip(a, b))/2 for a,b in zip(i.student.logits.double().tolist(), i.teacher.logits.double().tolist())])
        plt.close('all')
        i.plot_top_disagreements(2), i.plot_cka()
        plt.close('all')
        for f in ('agreement_matrix','error_table','plot_reliability','plot_errors'):
            with pytest.raises(ValueError, match='predicts values'): getattr(i, f)()
        with pytest.raises(ValueError, match='predicts values'): i.plot_softened(0)

class TestTeachers:
    "Whatever can answer"
    def test_kinds(self, tmp_path):
        s,t,i = digits()
        t.path = tmp_path
        t.export('t.pkl')
        for o in (t.model, Teacher(t), tmp_path/'t.pkl'): assert torch.equal(sided(s, o).teacher.logits, i.teacher.logits)
        two = digits_learner(s.dls, (4,8), seed=1)
        e = sided(s, [t, two])
        want = (i.teacher.probs+sided(s, two).teacher.probs)/2
        close(e.teacher.probs, want)
        with pytest.raises(ValueError, match='those of one teacher'): e.plot_cka()
    def test_store(self, tmp_path):
        s,t,_ = digits()
        i = sided(s, t)
        store = precompute_targets(t, s.dls, tmp_path/'s', dtype='float32', bar=noop)
        for o in (store, tmp_path/'s', str(tmp_path/'s')):
            j = sided(s, o)
            close(j.teacher.probs, i.teacher.probs)
            assert j.error_table().equals(i.error_table())
        close(sided(s, store, ds_idx=0).teacher.probs, sided(s, t, ds_idx=0).teacher.probs)
        a = digits_learner(store.attach(s.dls))
        a.model.load_state_dict(s.model.state_dict())
        a = sided(a, StoredTeacher(store), ds_idx=0) # whose batches carry the answers
        close(a.disagreements, sided(s, t, ds_idx=0).disagreements)
        a.plot_items([1,0])
        plt.close('all')
        with pytest.raises(ValueError, match='from a store'): j.plot_cka()
        with pytest.raises(ValueError, match='no stored answer.*pass the teacher itself'): sided(s, store, dl=digits_dls(400).train)
        sparse = precompute_targets(t, s.dls, tmp_path/'p', kind='sparse', T=4., bar=noop)
        with pytest.raises(ValueError, match='whole answers'): sided(s, sparse)
    def test_store_of_other_order(self, tmp_path):
        s,t,i = digits()
        store = precompute_targets(t, s.dls, tmp_path/'s', dtype='float32', bar=noop)
        rev = digits_learner(digits_dls(150, vocab=[str(o) for o in range(9,-1,-1)]))
        close(sided(rev, store).teacher.probs, i.teacher.probs.flip(1))
    def test_vocab(self):
        "Classes go by name"
        s,t,i = digits()
        rev = fitted(digits_learner(digits_dls(150, vocab=[str(o) for o in range(9,-1,-1)])))
        j = sided(rev, t)
        assert torch.equal(j.teacher.logits, i.teacher.logits.flip(1)) and list(j.agreement_matrix().index)==[str(o) for o in range(9,-1,-1)]
        v = Teacher(t, vocab=[*map(str, range(9)),'nine'])
        with pytest.raises(ValueError, match="does not know 1 of the student's 10 classes: \\['9'\\]"): sided(s, v)
    def test_other_items(self):
        "A teacher that was validated on other items may have been trained on these"
        s,t,i = tables()
        other = tabular_learner(table_dls(1), layers=[4])
        with pytest.raises(ValueError, match='different validation sets: 50 items and 50, 0 are in both.*such as row 0'): sided(s, other)
        assert len(sided(s, other, dl=s.dls.valid).student)==50
        less = tabular_learner(table_dls(0, 100), layers=[4])
        with pytest.raises(ValueError, match='50 items and 25, 25 are in both'): sided(s, less)

class TestBad:
    def test_types(self):
        s,t,i = digits()
        with pytest.raises(TypeError, match='the student is a Learner'): DistillationInterpretation.from_learners(s.model, t)
        with pytest.raises(TypeError, match='from_learners'): DistillationInterpretation.from_learner(s)
        with pytest.raises(TypeError, match='a teacher is'): sided(s, 3)
        with pytest.raises(ValueError, match='there is no number 5'): sided(s, t, ds_idx=5)
        with pytest.raises(ValueError, match='answers with 7 classes'): sided(s, tiny_cnn((4,), 7))
        with pytest.raises(ValueError, match='probabilities'): sided(s, nn.Sequential(t.model, nn.Softmax(1)))
        nan = digits_learner(s.dls)
        nan.model[-1].bias.data[:] = float('nan')
        with pytest.raises(ValueError, match="student's answers to 599 of 599 items are NaN"): sided(nan, t)
        with pytest.raises(ValueError, match="the teacher's answer to the first validation batch is not finite"): sided(s, nan)
        for bad in (0, -1, 2.5, True, 'x'):
            with pytest.raises((ValueError,TypeError), match='`k` must be'): i.top_disagreements(bad)
        for bad in ([], [599], -1, [0,7000], torch.ones(599).bool(), .5, 'a', None):
            with pytest.raises((ValueError,TypeError), match='`idxs` must be'): i.plot_items(bad)
        with pytest.raises(ValueError, match='`n_classes` must be'): i.plot_softened(0, n_classes=0)
        for bad in (0, 'x', True):
            with pytest.raises(ValueError, match='`k` must be'): masks()[2].plot_disagreement_masks(bad)
        for bad in (s.dls, [1,2], 'valid'):
            with pytest.raises(TypeError, match='`dl` is a DataLoader'): sided(s, t, dl=bad)
        with pytest.raises(TypeError, match='`ds_idx` is the number'): sided(s, t, ds_idx=True)
        with pytest.raises(ValueError, match="'inherited', 'corrected', 'new'"): i.top_disagreements(2, among='old')
        with pytest.raises(ValueError, match='temperature|greater than 0'): i.softened(0, 0.)
        with pytest.raises(ValueError, match='one distribution'): i.softened((0,1))
        with pytest.raises(ValueError, match='at every position'): i.plot_disagreement_masks(2)
        with pytest.raises(ValueError, match='name one by a tuple'): masks()[2].softened(0)
    def test_empty(self):
        s,t,_ = digits()
        with pytest.raises(ValueError, match='no items'): sided(s, t, dl=s.dls.valid.new(get_idxs=lambda: []))
    def test_unlabelled(self):
        s,t,i = digits()
        j = sided(s, t, dl=s.dls.test_dl(s.dls.valid.items[:20], bs=8))
        assert j.agreement_matrix().to_numpy().sum()==20 and torch.allclose(j.disagreements, i.disagreements[:20])
        for f in ('error_table','plot_reliability','plot_errors'):
            with pytest.raises(ValueError, match='needs labels'): getattr(j, f)()
        with pytest.raises(ValueError, match='needs labels'): j.top_losses(2)
        with pytest.raises(ValueError, match='needs labels'): j.top_disagreements(2, among='new')
        plt.close('all')
        j.plot_top_disagreements(2), j.plot_softened(0), j.plot_cka()
        assert plt.figure(1).axes[0].get_title().startswith('student ')
        plt.close('all')
        s,t,_ = masks()
        u = sided(s, t, dl=s.dls.test_dl(s.dls.valid.items[:6]))
        assert u.disagreement_masks([0]).unique().tolist() in ([0,3],[0],[3])
        u.plot_disagreement_masks(2)
        plt.close('all')
    def test_one_class(self):
        "Items of one class only: the others have empty rows, no division by 0"
        s,t,_ = digits()
        its = [o for o in s.dls.valid.items if o[1]==3][:12]
        i = sided(s, t, dl=s.dls.test_dl(its, with_labels=True))
        assert i.error_table()['items'].tolist()==[0,0,0,12,0,0,0,0,0,0,12]
        i.plot_agreement_matrix(normalize=True), i.plot_reliability(), i.plot_errors()
        plt.close('all')
        a = Answers(torch.zeros(3,1), torch.zeros(3).long())
        with pytest.raises(ValueError, match='single class'): DistillationInterpretation(s, s.dls.valid, a, a)
    def test_nothing_to_show(self, capsys):
        s,t,i = digits()
        sided(s, s).plot_top_disagreements(3, among='new')
        assert 'none of the errors is new' in capsys.readouterr().out
    def test_own_loss(self):
        "Another loss function does not say what predictions are"
        s,t,i = digits()
        own = digits_learner(s.dls, loss_func=lambda p,y: F.cross_entropy(p, y))
        own.model.load_state_dict(s.model.state_dict())
        with pytest.raises(ValueError, match="kind='softmax'"): sided(own, t)
        assert sided(own, t, kind='softmax').error_table().equals(i.error_table())
    @pytest.mark.parametrize('make', [DataLoader, lambda d,bs: torch.utils.data.DataLoader(d, batch_size=bs)])
    def test_plain_loader(self, make):
        "A DataLoader that does not know how its items look"
        s,t,i = digits()
        j = sided(s, t, dl=make([(x.as_subclass(Tensor),int(y)) for x,y in (s.dls.valid_ds[k] for k in range(9))], bs=4))
        assert torch.allclose(j.disagreements, i.disagreements[:9], atol=1e-6) and j.error_table().loc['all','items']==9
        j.plot_top_disagreements(2), j.plot_softened(0), j.plot_cka()
        plt.close('all')
        with pytest.raises(ValueError, match='`items=True` needs'): j.top_disagreements(2, items=True)
    def test_loss_without_reduction(self):
        "A loss function of one's own that only knows its mean is asked item by item"
        s,t,i = digits()
        class Own(nn.Module):
            def forward(self, z, y): return F.cross_entropy(z, y)
        for lf in (lambda z, y: F.cross_entropy(z, y), Own(), lambda z, y, reduction='mean': F.cross_entropy(z, y)):
            l = Learner(s.dls, s.model, loss_func=lf)
            j = DistillationInterpretation(l, s.dls.valid, i.student, i.teacher)
            close(j.losses, i.losses)
            assert torch.equal(j.top_losses(3)[1], i.top_losses(3)[1])
        j.plot_top_losses(2)
        plt.close('all')
    def test_many_classes_are_thinned_out(self):
        n = 100
        s,y = digits()[0],torch.arange(200)%n
        a,b = [Answers(torch.randn(200, n, generator=torch.Generator().manual_seed(i)), y, 'softmax', [f'class {i}' for i in range(n)], -100, torch.arange(200)) for i in (0,1)]
        j = DistillationInterpretation(s, s.dls.valid, a, b)
        for plot,axes in ((j.plot_agreement_matrix,'xy'), (j.plot_errors,'x')):
            plot()
            for o in axes:
                at,labels = getattr(plt.gca(), f'get_{o}ticks')(),[l.get_text() for l in getattr(plt.gca(), f'get_{o}ticklabels')()]
                assert 10<len(at)<=30 and labels==[f'class {int(i)}' for i in at]
        digits()[2].plot_agreement_matrix()
        assert [o.get_text() for o in plt.gca().get_xticklabels()]==[str(i) for i in range(10)]
        plt.close('all')
    def test_files_are_the_same_from_any_folder(self, tmp_path):
        def learner(path, root=tmp_path):
            fs = [root/f'{i}.png' for i in range(6)]
            db = DataBlock((TransformBlock,CategoryBlock(vocab=['0','1'])), get_items=lambda _: fs, get_x=lambda o: torch.full((3,), float(o.stem)), get_y=lambda o: str(int(o.stem)%2), splitter=IndexSplitter([3,4,5]))
            return Learner(db.dataloaders(None, path=path, bs=2, num_workers=0), nn.Linear(3, 2))
        s = learner(tmp_path)
        for t in (learner('.'),learner(tmp_path/'x', tmp_path/'x')): assert len(sided(s, t).teacher)==3
        with pytest.raises(ValueError, match='0 are in both'): sided(s, learner('.', tmp_path/'x'))
    def test_random_transforms(self):
        "Both see the same version of an item"
        s = digits_learner(digits_dls(64, bs=16, batch_tfms=[Flip(p=.5), Rotate(45., p=1.)]))
        i = sided(s, s.model, ds_idx=0)
        assert torch.equal(i.student.logits, i.teacher.logits) and (i.disagreements==0).all()
    def test_part_labelled(self):
        "An item without a label counts where none is needed"
        s,t,i = digits()
        a,b = [Answers(o.logits[:6], tensor([-100,-100,*i.student.targ[2:6].tolist()]), 'softmax', o.vocab, -100, torch.arange(6)) for o in (i.student,i.teacher)]
        j = DistillationInterpretation(s, s.dls.valid, a, b)
        assert j.error_table().loc['all','items']==4 and j.agreement_matrix().to_numpy().sum()==6 and j._said([0,2]).target.tolist()==['',i._said([2]).target[2]]

def test_learners_are_as_they_were():
    "Modes, weights, random numbers, callbacks, recorder: of both"
    s,t,_ = digits()
    s,t = fitted(digits_learner(s.dls, cbs=CSVLogger())),digits_learner(s.dls, (4,8), seed=1)
    s.model.train(), t.model.train()
    t.model[0].eval()
    def state(): return [torch.get_rng_state().tolist(),random.getstate(),np.random.get_state()[1].tolist(),s.dls.valid.rng.getstate(),s.dls.train.rng.getstate(),
        *([m.training for m in l.model.modules()] for l in (s,t)), *({k:v.tolist() for k,v in l.model.state_dict().items()} for l in (s,t)), *([type(c) for c in l.cbs] for l in (s,t)),
        list(s.recorder.values), s.loss_func.reduction if hasattr(s.loss_func, 'reduction') else None, [len(m._forward_hooks) for l in (s,t) for m in l.model.modules()]]
    was = state()
    with contextlib.redirect_stdout(io.StringIO()), s.no_bar():
        i = DistillationInterpretation.from_learners(s, t)
        i.agreement_matrix(), i.error_table(), i.plot_reliability(), i.plot_top_disagreements(2), i.plot_softened(0), i.plot_cka(), i.losses, i.plot_top_losses(2)
    plt.close('all')
    assert state()==was
    Path('history.csv').unlink(missing_ok=True)
