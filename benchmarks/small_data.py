"""Few labels: are the answers of snapshots, of several looks, and of teachers that have not seen the item, better targets than those of one teacher?

    python benchmarks/small_data.py            # seeds 0 to 4
    python benchmarks/small_data.py 5 6 7

Teacher and student are trained on the same 120 items: digits (turned by up to 12 degrees in training), or rows of the table of tumours. In half of the runs 20 % of
these have a wrong label. Each seed has other items, other wrong labels and other weights; within a seed the student's initial weights and batches are the same for all.

Each row of small_data.csv is a student; rows that are there already are not run again."""
from fastai.vision.all import *
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import *
from sklearn.datasets import load_breast_cancer,load_digits
from sklearn.model_selection import train_test_split
import fcntl,sys,tempfile

out,n,T_epochs,S_epochs = Path(__file__).with_suffix('.csv'),120,12,30
class NoValid(Callback):
    "Saves the time of validation, in which nobody looks at the results"
    def before_validate(self): raise CancelValidException

def split(y, seed, part, classes):
    "Training and validation items, and labels of which `part` of those for training are wrong"
    rng,y = np.random.default_rng(seed),y.copy()
    trn,val = train_test_split(range_of(y), test_size=1/3, stratify=y, random_state=0)
    trn,_ = train_test_split(trn, train_size=n, stratify=y[trn], random_state=seed)
    wrong = rng.permutation(trn)[:int(part*n)]
    y[wrong] = (y[wrong]+rng.integers(1, classes, len(wrong)))%classes
    return trn,val,y

def img(o): return TensorImageBW(tensor(o[0]).float()[None]/16)
def digits(seed, part):
    d = load_digits()
    trn,val,y = split(d.target, seed, part, 10)
    block = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), CategoryBlock), get_x=img, get_y=ItemGetter(1), splitter=IndexSplitter(range(n, n+len(val))), batch_tfms=[Rotate(12, p=1.)])
    return block.dataloaders([[d.images[i],str(y[i])] for i in (*trn,*val)], bs=32, val_bs=600, num_workers=0, drop_last=False)
def digits_net(dls, big, seed): return digits_learner(dls, (16,32,64) if big else (4,8,16), seed)

def tumours(seed, part):
    df = load_breast_cancer(as_frame=True).frame
    trn,val,y = split(df.target.to_numpy(), seed, part, 2)
    df['target'] = np.array(['malignant','benign'])[y]
    return TabularPandas(df, [Normalize], [], list(df.columns[:30]), 'target', CategoryBlock(), splits=(L(*trn),L(*val))).dataloaders(bs=32, val_bs=512, drop_last=False)
def table_net(dls, big, seed):
    set_seed(seed, reproducible=True)
    dls.train.rng = random.Random(seed)
    return tabular_learner(dls, layers=[100,50] if big else [8], metrics=accuracy)
def noisy(cat, cont, seed): return cat,cont+.2*torch.randn(cont.shape, generator=torch.Generator().manual_seed(seed))

works = {'digits':(digits, digits_net, dict(tta=4), dict(stale_ok=True)), 'tumours':(tumours, table_net, dict(tta=[partial(noisy, seed=i) for i in range(4)]), {})}
def ways(looks): return {'one teacher':{}, 'five looks':looks, '3 snapshots':dict(snapshots=3), 'out of fold':dict(n_folds=4), 'out of fold, 3 snapshots':dict(n_folds=4, snapshots=3)}

def valid_accuracy(learn):
    with learn.no_bar(), learn.no_logging(): return learn.validate()[1]
def stored(store, ds): return torch.stack([store[o] for o in (ds.items.index if hasattr(ds, 'conts') else ds.items)]).softmax(1)

def run(data, part, seed):
    make,net,looks,kw = works[data]
    dls,d = make(seed, part),Path(tempfile.mkdtemp())
    def student(kd):
        learn = net(dls, False, seed+100)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(S_epochs, 1e-2, cbs=[NoValid(), *L(kd)])
        return valid_accuracy(learn)
    yield dict(way='labels alone', student=student(None))
    y = torch.cat([b[-1] for b in dls.valid])
    for nm,w in ways(looks).items():
        store = small_data_targets(partial(net, big=True, seed=seed), dls, d/nm, T_epochs, 1e-2, cbs=NoValid(), bar=noop, **{**({} if 'tta' in w else kw), **w})
        yield dict(way=nm, student=student(KnowledgeDistillation(store, T=4.)), teacher=(stored(store, dls.valid_ds).argmax(1)==y.as_subclass(Tensor).reshape(-1)).float().mean().item(),
            right=store.accuracy(), sure=stored(store, dls.train_ds).max(1).values.mean().item())

if __name__=='__main__':
    for seed in map(int, sys.argv[1:] or range(5)):
        for data in works:
            for part in (0.,.2):
                df = pd.read_csv(out) if out.is_file() else pd.DataFrame(columns=['data','part','seed','way'])
                if ((df.data==data)&(df.part==part)&(df.seed==seed)).any(): continue
                rows = pd.DataFrame([dict(data=data, part=part, seed=seed, **r) for r in run(data, part, seed)]).round(5)
                with open(out, 'a') as f:
                    fcntl.flock(f, fcntl.LOCK_EX)
                    rows.to_csv(f, index=False, header=f.tell()==0)
                print(rows.to_string(), flush=True)
