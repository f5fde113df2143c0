"Texts: tuples and hidden states of recurrent models, regularizers, tokens by name, outputs with a name"
import warnings
import numpy as np,pandas as pd,pytest,torch
from dataclasses import dataclass
from fastai.text.all import *
from fastkd.all import *
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

rng = random.Random(0)
words = dict(a='red green blue dark light'.split(), b='dog cat cow horse red'.split(), c='one two three four blue'.split())
def text(k): return ' '.join(rng.choice(words[k]+['the','of','x']) for _ in range(rng.randint(3,30)))
df = pd.DataFrame([dict(text=text(k), label=k) for k in 'abc' for _ in range(20)])
df['is_valid'] = [i%4==0 for i in range(60)]
df['value'] = [len(o)/50 for o in df.text]

def texts(is_lm=False, d=df, bs=8, vocab=None, seq_len=8, label=CategoryBlock, y='label', **kw):
    block = TextBlock.from_df('text', tok=BaseTokenizer(), rules=[], n_workers=0, min_freq=1, is_lm=is_lm, seq_len=seq_len, vocab=vocab)
    db = DataBlock(block if is_lm else (block,label), get_x=ColReader('text'), get_y=None if is_lm else ColReader(y), splitter=ColSplitter())
    return db.dataloaders(d, bs=bs, num_workers=0, **kw)
def config(lm, emb, hid, layers, **kw): return {**(awd_lstm_lm_config if lm else awd_lstm_clas_config), 'emb_sz':emb, 'n_hid':hid, 'n_layers':layers, **kw}
def learner(dls, emb=6, hid=8, layers=2, lm=None, seed=0, config_kw={}, seq_len=8, **kw):
    set_seed(seed)
    lm = ifnone(lm, isinstance(dls.train, LMDataLoader))
    cfg = config(lm, emb, hid, layers, **config_kw)
    learn = language_model_learner(dls, AWD_LSTM, config=cfg, pretrained=False, **kw) if lm else text_classifier_learner(dls, AWD_LSTM, config=cfg, pretrained=False, seq_len=seq_len, **kw)
    learn.opt_func = partial(Adam) # of its own
    return quiet(learn)
def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn
def big(dls, epochs=1, **kw):
    learn = learner(dls, 10, 12, 3, seed=1, **kw)
    if epochs: learn.fit(epochs, 1e-2)
    return learn

class Spy(Callback):
    "The batches of training: inputs, labels, what the student said, and the loss before and after distillation"
    order,run_valid = 100,False
    def __init__(self): self.seen = []
    def before_batch(self): self.h = hidden(self.learn.model)
    def after_loss(self):
        self.seen.append(SimpleNamespace(x=self.xb[0].clone(), y=self.yb[0].clone() if len(self.yb) else None, z=self.pred.detach().clone(), loss=self.learn.loss_grad.detach().as_subclass(Tensor).clone(), h=self.h,
            ar=[o.detach().clone() for o in (self.rnn.out,self.rnn.raw_out)] if hasattr(self.learn, 'rnn') else None, epoch=self.epoch))
def hidden(m):
    "State of a language model"
    h = getattr(m[0], 'hidden', None) if isinstance(m, nn.Sequential) else None
    return None if h is None else [tuple(o.clone() for o in p) for p in h]
def fit(learn, kd, n=1, cbs=(), how='fit', **kw):
    spy = Spy()
    set_seed(0)
    learn.dls.train.rng = random.Random(0)
    getattr(learn, how)(n, kw.pop('lr', 1e-2), cbs=[*L(kd),spy,*L(cbs)], **kw)
    return spy.seen
def say(m, x):
    m.eval()
    x = x.as_subclass(Tensor)
    with torch.no_grad():
        z = m(x)
        return z[0] if isinstance(z, tuple) else z
def close(a, b, **kw): torch.testing.assert_close(torch.as_tensor(a).float(), torch.as_tensor(b).float(), **{'rtol':1e-4, 'atol':1e-5, **kw})
def same_state(a, b): assert len(a)==len(b); [close(o, p) for s,t in zip(a, b) for o,p in zip(s, t)]
def centred(z): return z-z.mean(1, keepdim=True)
def kl(z, zt, T=5., axis=1): return T**2*(F.softmax(zt/T, axis)*(F.log_softmax(zt/T, axis)-F.log_softmax(z/T, axis))).sum(axis).mean()
def ce(z, y): return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.flatten())
def reg(o, alpha=2., beta=1.):
    "Activation regularization (AR) and its temporal kind (TAR) of the student"
    out,raw = o.ar
    return alpha*out.float().pow(2).mean()+beta*(raw[:,1:]-raw[:,:-1]).float().pow(2).mean()

dls,lm = texts(),texts(True)
teacher,lm_teacher = big(dls),big(lm)

class TestClassification:
    def test_values(self):
        "Tuples of both, texts longer than `bptt`, AR and TAR of the student as without distillation"
        assert max(b[0].shape[1] for b in dls.train)>8
        for o in fit(learner(dls), KnowledgeDistillation(teacher), 2):
            zt = say(teacher.model, o.x)
            assert o.z.shape==zt.shape==(len(o.y),3) and reg(o)>1e-4
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, zt)+reg(o))

    def test_regularizer_stays_whole(self):
        "Its weight does not shrink with that of the task; its gradient is that of the same batch without a teacher"
        def grads(*cbs):
            res = []
            class Grads(Callback):
                order,run_valid = 101,False
                def before_step(self): res.append([p.grad.clone() if p.grad is not None else None for p in self.model.parameters()]); raise CancelFitException
            fit(learner(dls, alpha=50., beta=20.), [*cbs], cbs=Grads())
            return res[0]
        class Task0(Callback):
            "The regularizer alone"
            order,run_valid = 2,False
            def after_loss(self): self.learn.loss_grad = self.learn.loss_grad-self.learn.loss
        a,b = grads(KnowledgeDistillation(teacher, alpha=0., task_weight=0.)),grads(Task0())
        assert any(g is not None and g.abs().sum()>0 for g in a)
        for g,h in zip(a, b):
            if h is not None: close(ifnone(g, torch.zeros_like(h)), h)

    def test_teacher_without_regularizer(self):
        "A teacher stays as it is: no gradients, its modes given back, its state reset"
        t = big(dls, 0)
        was = {k:v.clone() for k,v in t.model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            fit(learner(dls), KnowledgeDistillation(t))
        assert t.model.training and all(p.grad is None for p in t.model.parameters())
        assert all(torch.equal(v, was[k]) for k,v in t.model.state_dict().items())

    def test_drop_mult_and_gradual_unfreezing(self):
        learn,kd = learner(dls, drop_mult=.5),KnowledgeDistillation(teacher)
        learn.freeze()
        for to,lr in ((None,1e-2),(-2,slice(1e-3,1e-2)),(0,slice(1e-4,1e-3))):
            if to is not None: learn.freeze_to(to)
            was = [p.detach().clone() for p in learn.model.parameters()]
            for o in fit(learn, kd, how='fit_one_cycle', lr=lr): close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.x))+reg(o))
            for p,w in zip(learn.model.parameters(), was):
                if not p.requires_grad: assert torch.equal(p, w)
        assert len(learn.opt.hypers)==len(learn.opt.param_lists)>2

    def test_fine_tune(self):
        seen = fit(learner(dls), KnowledgeDistillation(teacher, 'dkd', alpha=.3), how='fine_tune')
        assert len(seen)==2*len(dls.train)
        for o in seen: close(o.loss, .7*ce(o.z, o.y)+.3*get_loss('dkd')(o.z, say(teacher.model, o.x), targ=o.y)+reg(o))

    def test_max_len_and_other_bptt(self):
        "Each model cuts a text in its own way"
        t = big(dls, seq_len=5, max_len=10)
        for o in fit(learner(dls), KnowledgeDistillation(t)): close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, o.x))+reg(o))

    def test_regression(self):
        values = texts(label=RegressionBlock, y='value')
        t = big(values, n_out=1)
        for o in fit(learner(values, n_out=1), KnowledgeDistillation(t)):
            zt = say(t.model, o.x)
            assert o.z.shape==zt.shape==(len(o.y),1)
            close(o.loss, .5*(o.z.flatten()-o.y).pow(2).mean()+.5*(o.z-zt).pow(2).mean()+reg(o))

    def test_stored(self, tmp_path):
        "The answer to a text that is read at once is that to the text alone, whatever else is in its batch"
        dls = texts(seq_len=40)
        t = big(dls, seq_len=40)
        store = precompute_targets(t, dls, tmp_path/'s', dtype='float32', bar=noop)
        assert len(store)==60
        a,b = [fit(learner(dls, seq_len=40), KnowledgeDistillation(o), 2) for o in (t,store)]
        for o,p in zip(a, b): assert torch.equal(o.x, p.x); close(o.loss, p.loss)
        for x,_,z in store.attach(dls).train:
            alone = torch.cat([say(t.model, o[o!=1][None]) for o in x.as_subclass(Tensor)])
            close(centred(z), centred(alone))

    def test_stored_pieces(self, tmp_path):
        "fastai's encoder reads longer texts piece by piece, a batch sorted by length: so are they asked about"
        store = precompute_targets(teacher, dls, tmp_path/'s', dtype='float32', bar=noop)
        dl = dls.train.new(shuffle=False, drop_last=False)
        z,want = store.get(store.rows(item_keys(dl, dls.path)[dl.get_idxs()])),torch.cat([say(teacher.model, b[0]) for b in dl])
        close(centred(z), centred(want))

    def test_cached(self, tmp_path):
        "Where the answers to some texts of a batch are stored, the others are asked about in their batch"
        part = texts(d=df.assign(is_valid=[i%4==0 or i%3!=0 for i in range(60)]), vocab=dls.vocab[0])
        fit(learner(part), KnowledgeDistillation(teacher, cache=tmp_path/'c'))
        before,keys,seen = TargetStore(tmp_path/'c'),item_keys(dls.train, dls.path),[]
        old = before.rows(keys)>=0
        assert 0<old.sum()<45
        class See(Callback):
            run_valid = False
            def after_loss(self): seen.append((keys[self.learn.dl.items_now],old[self.learn.dl.items_now],say(teacher.model, self.x)))
        fit(learner(dls), KnowledgeDistillation(teacher, cache=tmp_path/'c'), cbs=See())
        store = TargetStore(tmp_path/'c')
        assert len(store)>=40 and any(o.any() and not o.all() for _,o,_ in seen)
        for k,o,z in seen: close(centred(store.get(store.rows(k)).float())[~o], centred(z)[~o], atol=1e-4)

    def test_term_on_layers(self):
        learn,kd = learner(dls),KnowledgeDistillation(teacher, terms=Term('hint', '1.layers.0', '1.layers.0', weight=.1))
        seen = fit(learn, kd)
        for o in seen[:1]:
            rest = (o.loss-.5*ce(o.z, o.y)-.5*kl(o.z, say(teacher.model, o.x))-reg(o)).item()
            assert 0<rest<10

    def test_preflight_sees_a_tuple(self):
        "Another number of classes is found before the first step"
        small = texts(d=df.query("label!='c'").reset_index(drop=True))
        with pytest.raises(ValueError, match='3 classes, the student.s data have 2'): fit(learner(small), KnowledgeDistillation(teacher.model))
        class Steps(Callback):
            order,n = 0,0
            def before_batch(self): self.n += 1
        steps,learn = Steps(),learner(dls, n_out=4)
        with pytest.raises(ValueError, match=r'student \(\d+, 4\) and teacher \(\d+, 3\)'): fit(learn, KnowledgeDistillation(teacher), cbs=steps)
        assert steps.n==0

class TestAfterwards:
    def test_predictions(self):
        learn = learner(dls, cbs=KnowledgeDistillation(teacher), metrics=accuracy)
        learn.fit(1, 1e-2)
        want = F.softmax(torch.cat([say(learn.model, b[0]) for b in dls.valid]), 1)
        y = torch.cat([b[1].as_subclass(Tensor) for b in dls.valid])
        p,t = learn.get_preds(reorder=False)
        close(p, want); assert torch.equal(t, y)
        v = learn.validate()
        assert len(v)==2
        close(v[0], F.cross_entropy(want.log(), y)); close(v[1], (want.argmax(1)==y).float().mean())
        c,i,p = learn.predict('red green the dark')
        x = tensor([[dls.vocab[0].index(o) for o in 'red green the dark'.split()]])
        close(p, F.softmax(say(learn.model, x), 1)[0], rtol=1e-3); assert c==dls.vocab[1][i]
        assert len(learn.get_preds(dl=dls.test_dl(['red blue','dog cat cow']))[0])==2

    def test_export(self, tmp_path):
        learn = learner(dls, cbs=KnowledgeDistillation(teacher))
        learn.fit(1, 1e-2)
        learn.path = tmp_path
        learn.export('s.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            other = load_learner(tmp_path/'s.pkl')
        close(other.predict('red green the')[2], learn.predict('red green the')[2])
        assert not any(isinstance(cb, KnowledgeDistillation) for cb in other.cbs)

    def test_encoder_is_saved_and_loaded(self, tmp_path):
        "ULMFiT: a distilled language model's encoder in a classifier that is distilled, too"
        a = learner(lm, path=tmp_path)
        fit(a, KnowledgeDistillation(lm_teacher))
        a.save_encoder('enc')
        same = texts(vocab=lm.vocab)
        b = learner(same, path=tmp_path).load_encoder('enc')
        assert all(torch.equal(p, q) for p,q in zip(a.model[0].parameters(), b.model[0].module.parameters()))
        t = big(same)
        for o in fit(b, KnowledgeDistillation(t)): close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, o.x))+reg(o))

    def test_language_model_predicts(self):
        learn = learner(lm, cbs=KnowledgeDistillation(lm_teacher))
        learn.fit(1, 1e-2)
        torch.manual_seed(0)
        said = learn.predict('red green', n_words=5)
        assert said.startswith('red green') and len(said.split())==7
        v = learn.validate()
        learn.model.reset()
        zs = [(say(learn.model, x),y.as_subclass(Tensor)) for x,y in lm.valid]
        close(v[0], sum(ce(z, y)*y.numel() for z,y in zs)/sum(y.numel() for _,y in zs), rtol=1e-2)

class TestLanguageModel:
    def test_values(self):
        "Labels `(n,seq)`, logits `(n,seq,vocab)`; the divergence is a mean over positions; both carry their state from batch to batch"
        learn,t = learner(lm),big(lm)
        seen = fit(learn, KnowledgeDistillation(t), 2)
        assert len(seen)==2*len(lm.train) and len(lm.train)>4
        for epoch in range(2):
            # alone over the same batches, from an empty state
            t.model.reset()
            for o in [o for o in seen if o.epoch==epoch]:
                zt = say(t.model, o.x)
                assert o.z.shape==zt.shape==(*o.y.shape,len(lm.vocab))
                close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, zt, axis=-1)+reg(o))

    def test_hidden_states(self):
        "After k batches the teacher is where it would be alone; both begin an epoch empty, and validation leaves the teacher where it was"
        t = big(lm)
        states = []
        class States(Callback):
            order = 101
            def after_batch(self): states.append((self.training,self.epoch,self.xb[0].clone(),hidden(t.model),hidden(self.model)))
        seen = fit(learner(lm), KnowledgeDistillation(t), 2, cbs=States())
        for h in (seen[0].h,seen[len(lm.train)].h): assert all(not o.any() for p in h for o in p) # the student before an epoch
        assert any(o.any() for p in seen[1].h for o in p)
        alone = deepcopy(t.model).eval()
        for epoch in range(2):
            alone.reset()
            for training,e,x,h,_ in states:
                if e!=epoch: continue
                if training: say(alone, x)
                same_state(h, hidden(alone))
        # the student's is carried, too: not empty after its first batch, empty of training when validation begins
        train = [s for s in states if s[0]]
        assert all(any(o.any() for p in s[4] for o in p) for s in train)

    def test_a_smaller_last_batch_of_tokens(self):
        assert len({b[0].shape[1] for b in lm.train})==2 # the last one is shorter

    def test_without_carrying_it_is_wrong(self):
        "The loss of a teacher that forgets differs: the state matters"
        learn,t = learner(lm),big(lm)
        seen = fit(learn, KnowledgeDistillation(t))
        t.model.reset(); zs = [say(t.model, o.x) for o in seen]
        forgets = []
        for o in seen: t.model.reset(); forgets.append(say(t.model, o.x))
        assert torch.equal(zs[0], forgets[0]) and not torch.allclose(zs[3], forgets[3], atol=1e-6)

    def test_accumulation_and_clip(self):
        seen = fit(learner(lm), KnowledgeDistillation(lm_teacher), cbs=[GradientAccumulation(16),GradientClip(.1)])
        lm_teacher.model.reset()
        for o in seen: close(o.loss*16/8, .5*ce(o.z, o.y)+.5*kl(o.z, say(lm_teacher.model, o.x), axis=-1)+reg(o))

    def test_ensemble(self):
        "Each has a state of its own"
        two = [lm_teacher,learner(lm, 8, 8, 1, seed=2)]
        seen = fit(learner(lm), KnowledgeDistillation(two))
        for t in two: t.model.reset()
        for o in seen:
            zt = torch.stack([F.softmax(say(t.model, o.x), -1) for t in two]).mean(0).log()
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, zt, axis=-1)+reg(o))

    def test_interrupted_then_again(self):
        "An interrupt in the middle of an epoch leaves no state behind"
        class Stop(Callback):
            def after_batch(self):
                if self.training and self.iter==2: raise KeyboardInterrupt
        learn,kd = learner(lm),KnowledgeDistillation(lm_teacher)
        with pytest.raises(KeyboardInterrupt): fit(learn, kd, cbs=Stop())
        seen = fit(learn, kd)
        assert all(not o.any() for p in seen[0].h for o in p)
        lm_teacher.model.reset()
        for o in seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(lm_teacher.model, o.x), axis=-1)+reg(o))

    def test_lr_find(self):
        learn = learner(lm)
        was = {k:v.clone() for k,v in learn.model.state_dict().items()}
        with learn.added_cbs(KnowledgeDistillation(lm_teacher)): learn.lr_find(num_it=5, show_plot=False)
        assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())
        seen = fit(learn, KnowledgeDistillation(lm_teacher))
        lm_teacher.model.reset()
        close(seen[0].loss, .5*ce(seen[0].z, seen[0].y)+.5*kl(seen[0].z, say(lm_teacher.model, seen[0].x), axis=-1)+reg(seen[0]))

    def test_not_stored(self, tmp_path):
        with pytest.raises(ValueError, match='let the teacher run live'): precompute_targets(lm_teacher, lm, tmp_path/'s', bar=noop)
        with pytest.raises(ValueError, match='let the teacher run live'): fit(learner(lm), KnowledgeDistillation(lm_teacher, cache=tmp_path/'c'))

class TestTokens:
    "Vocabularies of tokens that differ"
    more = pd.concat([df,pd.DataFrame([dict(text='dog dog dog dog mouse the the dog mouse', label='b', is_valid=False)]*30)], ignore_index=True)
    def test_by_name(self):
        "Ids are translated; words that the teacher does not know are unknown to it"
        other = texts(d=self.more.assign(text=self.more.text.str.replace('red', 'crimson')))
        assert other.vocab[0]!=dls.vocab[0] and 'red' not in other.vocab[0] and 'mouse' not in dls.vocab[0]
        t = big(other)
        with pytest.warns(UserWarning, match=r"1 of \d+ words of the student \(red\) are unknown to it"): seen = fit(learner(dls), KnowledgeDistillation(t))
        o2i = {o:i for i,o in reversed(list(enumerate(other.vocab[0])))}
        to = tensor([o2i.get(o, 0) for o in dls.vocab[0]])
        naive = []
        for o in seen:
            zt = say(t.model, to[o.x])
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, zt)+reg(o))
            naive.append((zt-say(t.model, o.x)).abs().max().item())
        assert max(naive)>1e-3
    def test_stored_by_name(self, tmp_path):
        t = big(texts(d=self.more))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            store = precompute_targets(t, dls, tmp_path/'s', dtype='float32', bar=noop)
            a,b = [fit(learner(dls), KnowledgeDistillation(o)) for o in (t,store)]
        for o,p in zip(a, b): close(o.loss, p.loss, rtol=1e-3)
    def test_nothing_in_common(self):
        other = texts(d=df.assign(text=df.text.str.upper().str.replace('X', 'Y')))
        with pytest.raises(ValueError, match='no word in common'): fit(learner(dls), KnowledgeDistillation(big(other, 0)))
    def test_language_model(self):
        "There the tokens are the classes, too"
        t = big(texts(True, d=self.more), 0)
        with pytest.raises(ValueError, match=r'vocab=teacher.dls.vocab'): fit(learner(lm), KnowledgeDistillation(t))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert fit(learner(texts(True, vocab=t.dls.vocab)), KnowledgeDistillation(t))
    def test_plain_module(self):
        "A module does not say which tokens it knows: those of the student"
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            for o in fit(learner(dls), KnowledgeDistillation(teacher.model)): close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.x))+reg(o))

# -- what transformers return, without transformers
@dataclass
class Output:
    logits:Tensor
    hidden_states:tuple = ()
class DictOutput(OrderedDict):
    "A dict whose entries are attributes, too"
    def __getattr__(self, k):
        try: return self[k]
        except KeyError: raise AttributeError(k) from None
class Bag(nn.Module):
    "A bag of words with a mask, as a model for transformers is called"
    def __init__(self, d=8, out=Output, c=3):
        super().__init__()
        self.emb,self.att,self.head,self.out = nn.Embedding(40, d),nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True),nn.Linear(d, c),out
    def forward(self, input_ids):
        mask = input_ids==1
        h = self.att(self.emb(input_ids), src_key_padding_mask=mask)
        z = self.head(h.masked_fill(mask[...,None], 0).sum(1)/(~mask).sum(1, keepdim=True))
        return self.out(logits=z, hidden_states=(h,)) if self.out is not None else z
def bag(seed=0, **kw): torch.manual_seed(seed); return Bag(**kw)
class Logits(nn.Module):
    "The user's own loss on such an output"
    def forward(self, out, y): return F.cross_entropy(out.logits, y)

class TestNamedOutputs:
    @pytest.mark.parametrize('out', [Output,DictOutput])
    def test_teacher(self, out):
        m = bag(1, d=16, out=out)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            seen = fit(learner(dls), KnowledgeDistillation(m))
        for o in seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(m, o.x).logits)+reg(o))

    @pytest.mark.parametrize('out,pick', [(Output,None),(DictOutput,None),(DictOutput,'logits'),(Output,lambda o: o.logits)])
    def test_student(self, out, pick):
        seen = []
        class See(Callback):
            order,run_valid = 100,False
            def after_loss(self): seen.append(SimpleNamespace(x=self.x.clone(), y=self.y.clone(), z=self.pred.logits.detach().clone(), loss=self.learn.loss_grad.detach().clone()))
        learn = quiet(Learner(dls, bag(out=out), loss_func=Logits()))
        learn.fit(1, 1e-2, cbs=[KnowledgeDistillation(teacher, 'kd', pred_kd=pick),See()])
        assert len(seen)==len(dls.train)
        for o in seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.x)))

    def test_both_with_an_unknown_loss(self):
        "The loss of the labels does not say what fits"
        learn = quiet(Learner(dls, bag(), loss_func=Logits()))
        with pytest.raises(ValueError, match='no response loss is known'): learn.fit(1, cbs=KnowledgeDistillation(bag(1)))

    def test_fastai_takes_the_logits(self):
        "The usual way: a callback that leaves the logits, after which all is as ever"
        class TakeLogits(Callback):
            def after_pred(self): self.learn.pred = self.pred.logits
        learn = quiet(Learner(dls, bag(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=TakeLogits()))
        m = bag(1, d=16)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            seen = fit(learn, KnowledgeDistillation(m, terms=Term('hint', 'att', 'att')))
        assert len(learn.recorder.values[-1])==6
        with pytest.raises(ValueError, match="has no output 'nope'"): fit(quiet(Learner(dls, bag(out=DictOutput), loss_func=Logits())), KnowledgeDistillation(teacher, 'kd', pred_kd='nope'))
        for o in seen[:1]: assert (o.loss-.5*ce(o.z, o.y)-.5*kl(o.z, say(m, o.x).logits)).item()>0
