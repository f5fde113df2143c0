"""Does anything grow faster than the data? Stores of a thousand to a million items, and losses of ten to 50,000 classes.

    python benchmarks/scale.py                        # ten minutes on one core, 3 GB of memory
    python benchmarks/scale.py --parts losses

Stores: answers in 1000 classes as 'sparse' rows, each size in a process of its own. Microseconds of CPU time per item of naming items, writing, opening, reading random batches of 64 (for the first time, when rows are
compared with their checksums, and again), looking up the rows of such a batch, and the same with the seeds of their replay. `memory` is the most memory of the process (pages of files left out, which the system takes back) beyond that before.

Losses: forward and backward pass to the student's logits of 64 items, in turns with the KL divergence as one writes it. `memory` is the most that torch's allocator hands out beyond
the logits, as a multiple of the student's. A loss that would take more than 1 GB is left out at that size, and the table says so.

`slope` is that of a line through the points on log axes: 1 is proportional, 0 constant. For stores it is that of the time of all items; for losses that from 1000 classes on,
below which a call costs more than its numbers."""
import subprocess,sys,tempfile
from timing import *
from dense import peak,plain
from store import random_store

store_sizes,class_sizes = [10**i for i in range(3,7)],[10,100,1000,10_000,50_000]
names = 'kd mse_logits rkl jsd bkd hard dkd nkd dist lskd mlkd ttm wsld ofa abkd skd_instance'.split()

def slope(x, y): return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x)>1 else None

# -- stores
def private_mb(): return int((_status('RssAnon') or _status('VmRSS') or [0])[0])/1024
def _status(k): return re.findall(rf'{k}:\s+(\d+)', Path('/proc/self/status').read_text()) if Path('/proc/self/status').exists() else []

def one_store(n, c=1000):
    "Microseconds per item, and MB, of a store of `n` items"
    us,rng,top = {},np.random.default_rng(0),[]
    def per_item(name, f, k=n):
        us[name] = clocks(f)[1]*1e3/k
    with tempfile.TemporaryDirectory() as d, fair():
        spec = dict(kind='sparse', T=2.)
        # torch's and fastkd's own buffers
        random_store(Path(d)/'warm', 8192, c, **spec)
        before = private_mb()
        per_item('name', lambda: [item_key(i) for i in range(n)])
        per_item('write', lambda: random_store(Path(d)/'s', n, c, lambda: top.append(private_mb()), **spec))
        us['write'] -= us['name']
        store,keys = None,np.array([item_key(i) for i in range(n)], np.uint64)
        def _open():
            nonlocal store
            store = TargetStore(Path(d)/'s')
            store.rows(keys[:1])
        per_item('open', _open)
        batches = [o for o in np.split(rng.permutation(keys)[:64*min(n//64, 500)], min(n//64, 500))]
        read,m = lambda: [store.get(store.rows(b)) for b in batches],64*len(batches)
        per_item('first read', read, m)
        for name,f in {'read':read, 'look up':lambda: [store.rows(b) for b in batches], 'look up to replay':lambda: [(store.rows(b),[item_seed(0, 0, int(k)) for k in b]) for b in batches]}.items():
            per_item(name, lambda: [f() for _ in range(500//len(batches))], m*(500//len(batches)))
        top.append(private_mb())
        return dict(items=n, us=us, memory_mb=max(0, max(top)-before), disk=sum(o.stat().st_size for o in (Path(d)/'s').rglob('*') if o.is_file())/n)

def stores(sizes):
    rows = []
    for n in sizes:
        out = subprocess.run([sys.executable, __file__, '--one', str(n)], capture_output=True, text=True)
        if out.returncode: raise RuntimeError(f'a store of {n:,} items: {out.stderr[-2000:]}')
        rows.append(r:=json.loads(out.stdout.splitlines()[-1]))
        print(f"{n:>9,} items  {'  '.join(f'{k} {v:7.2f}' for k,v in r['us'].items())} µs/item  memory {r['memory_mb']:6.1f} MB", flush=True)
    slopes = {k:slope(sizes, [r['us'][k]*r['items'] for r in rows]) for k in rows[0]['us']}
    print('slopes', {k:ifnone(v, 0) and round(v, 2) for k,v in slopes.items()})
    return dict(rows=rows, slopes=slopes)

# -- losses
def losses(sizes, rounds, bs=64, most=1e9):
    forms = {k:get_loss(k) for k in names}
    rows,skipped = [],{}
    for c in sizes:
        torch.manual_seed(0)
        s,t,y = (torch.randn(bs, c)*3).requires_grad_(),torch.randn(bs, c)*3,torch.randint(c, (bs,))
        fs = {'plain':lambda: torch.autograd.grad(plain(s, t), s)}
        for k,l in forms.items():
            last = [r for r in rows if r['loss']==k]
            # as if it grew with the square, where it has done more than double the multiple
            grows = len(last)>1 and last[-1]['memory']>2*last[-2]['memory']
            guess = (last[-1]['memory']*(c/last[-1]['classes'] if grows else 1) if last else 0)*s.nbytes
            if k in skipped or guess>most: skipped.setdefault(k, c)
            else: fs[k] = lambda l=l: torch.autograd.grad(l(s, t, y) if 'targ' in l.needs else l(s, t), s)
        mem = {k:peak(f)/s.nbytes for k,f in fs.items()}
        times = at_ease(list(fs.values()), rounds, secs=20., min_ms=2.)[...,1]
        for i,k in enumerate(fs):
            rows.append(dict(loss=k, classes=c, ms=float(np.median(times[:,i])), ratio=interval(over(i, 0), times), memory=mem[k]))
            print(f"{k:13} {c:>6,} classes {rows[-1]['ms']:9.3f} ms  {rows[-1]['ratio'][0]:6.2f} of plain  memory {mem[k]:6.2f} × logits", flush=True)
    slopes = {}
    for k in ('plain',*names):
        large = [r for r in rows if r['loss']==k and r['classes']>=1000]
        slopes[k] = slope([r['classes'] for r in large], [r['ms'] for r in large])
    return dict(rows=rows, slopes=slopes, skipped=skipped, items=bs)

@call_parse
def main(
    parts:str='stores,losses', # Which, with commas
    most:int=1_000_000, # Items of the largest store
    rounds:int=9, # Samples of each loss
    one:int=0, # A store of so many items alone, for use by this script
    out:str=str(here/'scale.json') # Results
):
    "Time and memory against the number of items and of classes"
    if one: return print(json.dumps(one_store(one)))
    began,res = begin(),{}
    if 'stores' in parts: res['stores'] = stores([o for o in store_sizes if o<=most])
    with fair():
        if 'losses' in parts: res['losses'] = losses(class_sizes, rounds)
    write(out, res, began)
