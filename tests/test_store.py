"Stored targets through crashes, damage, full disks, careless hands and the network: the right answer, none, or an error"
import errno,json,mmap,os,pickle,random,shutil,signal,struct,sys,time
import numpy as np,pytest,torch
from pathlib import Path
from fastkd.targets import files,write
from fastkd.targets.files import *
from fastkd.targets.kinds import *
from fastkd.targets.store import *
from fastkd.targets.write import *

pytestmark = pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
spec = dict(kind='dense', shape=[5])

def quiet(o): return o
def keys_of(n, start=0): return np.array([item_key(i) for i in range(start, start+n)], np.uint64)
def answers(keys, view=0):
    "What the teacher says, without a teacher: a function of the key and the view"
    x = (np.asarray(keys, np.uint64)[:,None]*np.arange(1, 7, dtype=np.uint64)+np.asarray(view, np.uint64).reshape(-1,1)*np.uint64(977))>>np.uint64(44)
    return dict(logits=(x[:,:5]/2**14).astype('<f2'), mean=(x[:,5]/7).astype('<f4'))
def guards(keys): return dict(acc=(keys%np.uint64(101)).astype('u1'), xsum=(keys>>np.uint64(33)).astype('<u4'))
def fill(w, keys, view=0): w.put_fields(keys, answers(keys, view), view, **guards(keys))

def make(path, n=6, views=1, parts=1, **kw):
    s,keys = TargetStore.create(path, make_manifest(spec, views=views, **kw)),keys_of(n)
    for k in np.array_split(keys, parts):
        with TargetWriter(s, k) as w:
            for v in range(views): fill(w, k, v)
    return s,keys

def check(path, keys, views=1):
    "The rows that the store still has must be right; how many there are, or None where it refuses"
    try:
        s,n = TargetStore(path),0
        for v in range(views):
            r = s.rows(keys, v)
            k,r = keys[r>=0],r[r>=0]
            got,want = s.fields(r, list(s._files)),{**answers(k, v),**guards(k)}
            for nm in want if len(r) else (): assert got[nm].tobytes()==want[nm].tobytes(), f'{nm} of {path} is silently different'
            n += len(r)
        assert s.verify(bar=quiet)==n
    except ValueError as e:
        assert str(e) and '\n' not in str(e)[:20]
        return None
    return n

# -- kill -9

def child(f, *args):
    "Run `f` in a process of its own"
    if (pid:=os.fork()): return pid
    try:
        f(*args)
        os._exit(0)
    except BaseException as e:
        print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True)
        os._exit(1)

def work(path, keys, seed, done, chunk=2):
    "What a precompute does: claim what is missing, write it in some order"
    s = TargetStore.create(path, make_manifest(spec))
    miss = keys[s.rows(keys)<0]
    np.random.default_rng(seed).shuffle(miss)
    with TargetWriter(s, miss) as w:
        done[4:5] = b'x'
        for i in range(0, len(miss), chunk):
            fill(w, miss[i:i+chunk])
            done[:4] = struct.pack('<I', struct.unpack('<I', done[:4])[0]+len(miss[i:i+chunk]))

def kills(d, most=200, writers=4, n=800, seed=0):
    "Kill processes that write stores in `d`, `most` times; the sizes that stores had then"
    rng,killed,n_store,seen = random.Random(seed),0,0,set()
    keys = keys_of(n)
    shares = [keys[i::writers] for i in range(writers)]
    (d/'ref').mkdir()
    work(d/'ref'/'s', keys, 0, bytearray(5))
    ref = TargetStore(d/'ref'/'s')
    whole = ref.fields(ref.rows(keys), list(ref._files))
    path = d/'0'
    while killed<most:
        before = len(TargetStore(path)) if (path/'manifest.json').exists() else 0
        done = [mmap.mmap(-1, 5) for _ in shares]
        pids = [child(work, path, h, rng.getrandbits(32), d) for h,d in zip(shares, done)]
        # a quarter while they open the store and claim, the others as they write
        if rng.random()<.75:
            end = time.perf_counter()+30
            while not all(d[4] for d in done) and time.perf_counter()<end: time.sleep(.0002)
        ends = [time.perf_counter()+rng.random()*.03 for _ in pids]
        for t,pid in sorted(zip(ends, pids)):
            time.sleep(max(0, t-time.perf_counter()))
            os.kill(pid, signal.SIGKILL)
        stats = [os.waitpid(p, 0)[1] for p in pids]
        assert all(os.WIFSIGNALED(s) or os.WEXITSTATUS(s)==0 for s in stats)
        killed += sum(map(os.WIFSIGNALED, stats))
        if not (path/'manifest.json').exists(): continue
        s = TargetStore(path)
        r = s.rows(keys)
        got = s.fields(r[r>=0], list(s._files))
        for k in got: assert got[k].tobytes()==whole[k][r>=0].tobytes(), k
        told = sum(struct.unpack('<I', d[:4])[0] for d in done)
        assert before+told<=len(s)<=before+told+2*len(pids)
        assert s.verify(bar=quiet)==len(s)
        seen.add(len(s))
        if len(s)==len(keys): path = d/(n_store:=n_store+1).__str__()
    work(path, keys, 1, bytearray(5))
    s = TargetStore(path)
    assert len(s)==len(keys) and s.verify(bar=quiet)==n
    got = s.fields(s.rows(keys), list(s._files))
    assert all(got[k].tobytes()==whole[k].tobytes() for k in got)
    return seen

@posix
def test_killed_at_any_moment(tmp_path): assert len(kills(tmp_path))>20

@posix
def test_lock_ends_with_its_process(tmp_path):
    "Not with the workers that it has started"
    s,keys = TargetStore.create(tmp_path/'s', make_manifest(spec)),keys_of(8)
    r,to = os.pipe()
    def parent():
        w = TargetWriter(TargetStore(tmp_path/'s'), keys)
        fill(w, keys[:2])
        worker = child(time.sleep, 60)
        os.write(to, struct.pack('<I', worker))
        time.sleep(60)
    pid = child(parent)
    worker, = struct.unpack('<I', os.read(r, 4))
    try:
        with pytest.raises(ValueError, match='8 of 8 items are being written by another process'): TargetWriter(s, keys)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        with TargetWriter(s.refresh(), keys) as w: fill(w, keys[2:])
        assert check(tmp_path/'s', keys)==8
    finally: os.kill(worker, signal.SIGKILL)
    # nor does a worker keep what its parent has closed
    w = TargetWriter(s, keys_of(4, 100))
    worker = child(time.sleep, 60)
    try:
        w.close()
        TargetWriter(s, keys_of(4, 100)).close()
    finally: os.kill(worker, signal.SIGKILL); os.waitpid(worker, 0)

def test_left_behind(tmp_path):
    "What a killed process leaves before its first row is cleared away, also where a reader has just seen it"
    s,keys = make(tmp_path/'s')
    with TargetWriter(s, keys_of(3, 50)): pass
    (tmp_path/'s'/'000002.part').mkdir()
    (tmp_path/'s'/'000002.part'/'junk').write_bytes(b'x')
    assert len(s.parts)==2
    with TargetWriter(s, keys_of(3, 60)) as w: fill(w, keys_of(3, 60))
    # numbers are not used again: a reader may be between listing a folder and opening its files
    assert sorted(o.name for o in (tmp_path/'s').iterdir() if o.is_dir())==['000000','000003'] and len(s)==9
    d = tmp_path/'new'
    d.mkdir(); (d/'lock').touch(); (d/'manifest.json.part').write_text('{"form')
    assert len(TargetStore.create(d, make_manifest(spec)))==0

# -- writers

@posix
def test_two_writers(tmp_path):
    s,keys = TargetStore.create(tmp_path/'s', make_manifest(spec)),keys_of(10)
    with TargetWriter(s, keys[:6]) as w:
        with pytest.raises(ValueError, match='2 of 5 items are being written by another process'): TargetWriter(TargetStore(tmp_path/'s'), keys[4:9])
        def other():
            with pytest.raises(ValueError, match='being written'): TargetWriter(TargetStore(tmp_path/'s'), keys[5:])
            with TargetWriter(TargetStore(tmp_path/'s'), keys[6:]) as w2: fill(w2, keys[6:])
        assert os.waitpid(child(other), 0)[1]==0
        fill(w, keys[:3])
        for again in (keys[2:4], keys[[4,4]]):
            with pytest.raises(ValueError, match='a row is written once: 1 of 2'): fill(w, again)
        fill(w, keys[3:6])
    assert check(tmp_path/'s', keys)==10
    with TargetWriter(s, keys) as w:
        with pytest.raises(ValueError, match='a row is written once: 4 of 4'): fill(w, keys[4:8])
    assert check(tmp_path/'s', keys)==10

def test_no_locks(tmp_path, monkeypatch):
    "Without `flock` nothing is cleared away, and rows that were written twice are found"
    monkeypatch.setattr(files, 'fcntl', None)
    s,keys = TargetStore.create(tmp_path/'s', make_manifest(spec)),keys_of(4)
    a = TargetWriter(s, keys)
    b = TargetWriter(TargetStore(tmp_path/'s'), keys)
    fill(a, keys[1:]); fill(b, keys[:1])
    with pytest.raises(ValueError, match='a row is written once'): fill(b, keys[1:2])
    fill(a, keys[:1])
    a.close(); b.close()
    with pytest.raises(ValueError, match='1 rows are stored twice'): TargetStore(tmp_path/'s').rows(keys)

def test_careless_puts(tmp_path):
    s,keys = make(tmp_path/'s', views=2)
    new = keys_of(4, 100)
    with TargetWriter(s, new) as w:
        for k,f,v,why in [(new[:2], answers(new), 0, 'need an array'), (new, {'logits':answers(new)['logits']}, 0, "need an array 'mean'"), (keys[:4], answers(new), 0, '4 of 4 items were not claimed'),
            (new, answers(new), 2, '`view` must be 0 to 1'), (new, answers(new), -1, '`view` must be'), (new[None], answers(new), 0, 'one per row'),
            (new, {k:o.astype('<f4') for k,o in answers(new).items()}, 0, "of '<f2'")]:
            with pytest.raises(ValueError, match=why): w.put_fields(k, f, v)
        with pytest.raises(ValueError, match='expected'): w.put(new, torch.zeros(4, 6))
        with pytest.raises(ValueError, match='need an array'): w.put(new[:3], torch.zeros(4, 5))
        for bad in (float('nan'), float('inf'), 1e6):
            out = torch.zeros(4, 5)
            out[2,0] = bad
            with pytest.raises(ValueError) as e: w.put(new, out)
            assert e.value.rows==[2]
        w.put(new[:0], torch.zeros(0, 5))
        assert len(w.crc.nonzero()[0])==0
        w.put(new, torch.randn(4, 5), acc=101, xsum=2**32-1)
    with pytest.raises(ValueError, match='is closed'): fill(w, new)
    with TargetWriter(s, new[:0]): pass
    assert s.verify(bar=quiet)==16
    with pytest.raises(ValueError, match='no stored answer'): s.fields(np.array([0,-1]))

# -- damage

def flip(f, bit):
    b = bytearray(f.read_bytes())
    b[bit//8] ^= 1<<bit%8
    f.write_bytes(b)

def bits_of(f, rng, most=400):
    n = 8*f.stat().st_size
    return range(n) if n<=most else sorted(rng.sample(range(n), most))

def refused_manifest(b):
    with pytest.raises(ValueError): read_manifest(b, 'there')

@pytest.mark.parametrize('packed', [False,True])
def test_flipped_bits(tmp_path, packed):
    s,keys = make(tmp_path/'s', n=6, views=2, parts=2, vocab=list('abcde'), teacher=dict(name='t', hash='1'))
    if packed: s.pack(tmp_path/'s.safetensors')
    path,rng,n = tmp_path/('s.safetensors' if packed else 's'),random.Random(0),0
    for f in [path] if packed else sorted(o for o in path.rglob('*') if o.is_file() and o.stat().st_size):
        b = f.read_bytes()
        if f.name=='manifest.json':
            for i in range(8*len(b)): refused_manifest(b[:i//8]+bytes([b[i//8]^1<<i%8])+b[i//8+1:])
            continue
        for i in bits_of(f, rng, 1500 if packed else 500 if f.parent.name=='000000' and f.name=='logits.npy' else 60):
            flip(f, i)
            got,n = check(path, keys, 2),n+1
            assert got is None or got<12, f'bit {i} of {f.name} made no difference'
            f.write_bytes(b)
    assert check(path, keys, 2)==12 and n>=1000

@pytest.mark.parametrize('packed', [False,True])
def test_cut_and_longer(tmp_path, packed):
    s,keys = make(tmp_path/'s', n=5, parts=2)
    if packed: s.pack(tmp_path/'s.safetensors')
    path = tmp_path/('s.safetensors' if packed else 's')
    for f in [path] if packed else sorted(o for o in path.rglob('*') if o.is_file() and o.stat().st_size):
        b = f.read_bytes()
        if f.name=='manifest.json':
            for c in [*(b[:i] for i in range(len(b))), b+b'\0', b+b]: refused_manifest(c)
            continue
        for c in [*(b[:i] for i in range(len(b))), b+b'\0', b+b[-64:], b+b]:
            f.write_bytes(c)
            assert check(path, keys) is None, (f.name, len(c))
        f.unlink()
        with pytest.raises((ValueError,FileNotFoundError)): TargetStore(path).verify(bar=quiet)
        f.write_bytes(b)
    assert check(path, keys)==5

def test_damaged_rows_leave_the_others(tmp_path):
    s,keys = make(tmp_path/'s', n=6, views=2)
    f = tmp_path/'s'/'000000'/'logits.npy'
    flip(f, 8*(f.stat().st_size-1))
    s = TargetStore(tmp_path/'s')
    assert s.fields(s.rows(keys[:5], 1))['mean'].tobytes()==answers(keys[:5], 1)['mean'].tobytes()
    with pytest.raises(ValueError, match=rf"row 11 of '000000' \(item {keys[5]:016x}\)"): s.get(s.rows(keys, 1))
    with pytest.raises(ValueError, match='1 of 12 stored rows are damaged'): s.verify(bar=quiet)
    assert s.verify(drop=True, bar=quiet)==11 and s.rows(keys[5:], 1)[0]==-1
    with TargetWriter(s, keys[5:]) as w: fill(w, keys[5:], 1)
    assert check(tmp_path/'s', keys, 2)==12
    p = s.pack(tmp_path/'p.safetensors')
    flip(p.path, 8*p.path.stat().st_size-1)
    with pytest.raises(ValueError, match='cannot be dropped'): TargetStore(p.path).verify(drop=True, bar=quiet)

def test_swapped(tmp_path):
    "Files of another part or store, rows and folders copied by hand"
    s,keys = make(tmp_path/'a', n=8, parts=2)
    other,_ = make(tmp_path/'b', n=8, parts=2, seed=1)
    fs = sorted(o.name for o in (tmp_path/'a'/'000000').glob('*.npy'))
    for nm in fs:
        for src in ('a/000001','b/000000','b/000001'):
            f = tmp_path/'a'/'000000'/nm
            b = f.read_bytes()
            if b==(c:=(tmp_path/src/nm).read_bytes()): continue
            f.write_bytes(c)
            assert check(tmp_path/'a', keys) in ((None,) if nm!='crc.npy' or 'b' in src else (None,0)), (nm,src)
            f.write_bytes(b)
    a = tmp_path/'a'/'000000'
    shutil.copytree(a, tmp_path/'a'/'000007')
    with pytest.raises(ValueError, match='4 rows are stored twice, such as row . of'): TargetStore(tmp_path/'a').rows(keys)
    assert check(tmp_path/'a', keys) is None
    shutil.rmtree(tmp_path/'a'/'000007')
    shutil.copytree(tmp_path/'b'/'000000', tmp_path/'a'/'000007')
    shutil.rmtree(tmp_path/'a'/'000000')
    assert check(tmp_path/'a', keys) is None
    shutil.move(tmp_path/'a'/'000007', a)
    # a row over another row, with and without its key
    s,keys = make(tmp_path/'c', n=4)
    for names in (fs, [o for o in fs if o!='keys.npy']):
        shutil.copytree(tmp_path/'c', d:=tmp_path/f'd{len(names)}')
        for nm in names:
            x = np.load(d/'000000'/nm)
            x[2] = x[0]
            np.save(d/'000000'/nm, x)
        for f in (d/'000000').glob('*.npy'):
            # as numpy writes it, the header is another one
            x = np.load(f)
            make_npy(f, x.dtype.str, x.shape, x)
        assert check(d, keys) is None
    # the manifest of another store
    shutil.copy(tmp_path/'b'/'manifest.json', tmp_path/'c'/'manifest.json')
    assert check(tmp_path/'c', keys) is None

edits = {'version':[2,0,'1',None,True,1.5], 'format':['x',None,3], 'views':[0,-1,2,10**12,'1',True,1.,None], 'seed':[-1,2**64,'0',None,1.5], 'replay':[0,'yes'], 'stale':[1,None],
    'vocab':['abc',[[1]],[None],{'a':1},5], 'teacher':[None,'x',[]], 'tfms':[[1],'x',{}], 'made':[None,[]],
    'spec':[None, {}, [], 'dense', {'kind':'dense'}, {'kind':'dense','shape':[5],'more':1},
        *({'shape':o} for o in ([], [0], [-5], [6], [2**40], [2**70], [10**30]*5, [5.5], ['5'], [True], None, 5, '5', {}, {'../../etc/passwd':[5]}, {'/etc/x':[5]}, {'a':{'b':[5]}}, {'a':[5]}, [[5]])),
        *({'kind':o} for o in ('x', None, [], {}, 'sparse', 'dense8', 'features')), *({'task':o} for o in ('x', None, [], {}, {'a':'softmax'}, 'regress', 'binary')),
        *({'axis':o} for o in (1, -2, '0', None, 1.5)), *({'dtype':o} for o in ('float64', None, 'O', '<f2', [], 'float32')), {'kind':'sparse','T':-1}, {'kind':'sparse','T':1,'k':10**9}, {'kind':'sparse','T':'x'}, {'kind':'sparse','T':1,'k':1}]}

def edited(m, k, v):
    "A manifest, edited by somebody who knows how the checksum is made"
    m = json.loads(json.dumps(m))
    m[k] = {**m[k],**v} if k=='spec' and isinstance(v, dict) and v and 'more' not in v and v!={'kind':'dense'} else v
    return {**m, 'checksum':digest({k:o for k,o in m.items() if k!='checksum'})}

@pytest.mark.parametrize('k', list(edits))
@pytest.mark.parametrize('n', [4,0])
def test_manifest_by_hand(tmp_path, k, n):
    "Refused with an error that says so; harmless only where there is nothing to read"
    s,keys = make(tmp_path/'s', n=n) if n else (TargetStore.create(tmp_path/'s', make_manifest(spec)),keys_of(4))
    f,bad = tmp_path/'s'/'manifest.json',0
    for v in edits[k]:
        m = edited(s.manifest, k, v)
        if n:
            f.write_text(json.dumps({**m, 'checksum':s.manifest['checksum']}))
            with pytest.raises(ValueError, match='altered|version|not say'): TargetStore(tmp_path/'s')
        f.write_text(json.dumps(m))
        got = check(tmp_path/'s', keys)
        assert got is None or (got==0 and not n) or k=='made', (k,v)
    for junk in (b'', b'{', b'[]', b'null', b'\xff\xfe', b'['*100000, json.dumps({o:v for o,v in s.manifest.items() if o!=k}).encode(), json.dumps({**s.manifest, 'extra':1}).encode(), b'{"a":1'+b'0'*5000+b'}'):
        f.write_bytes(junk)
        with pytest.raises(ValueError): TargetStore(tmp_path/'s')

def test_packed_head_by_hand(tmp_path):
    s,keys = make(tmp_path/'s', n=4)
    p = s.pack(tmp_path/'s.safetensors').path
    b = p.read_bytes()
    n, = struct.unpack('<Q', b[:8])
    head,data = json.loads(b[8:8+n]),b[8+n:]
    def written(d):
        h = d if isinstance(d, bytes) else json.dumps(d).encode()
        p.write_bytes(struct.pack('<Q', len(h))+h+data)
        return check(p, keys)
    assert written(head)==4
    swap = {**head, 'mean':head['xsum'], 'xsum':head['mean']}
    bad = [[], None, 5, {}, {'__metadata__':{}}, b'['*200000, swap, {k:v for k,v in head.items() if k!='keys'}, {k:v for k,v in head.items() if k!='__metadata__'}, {**head, '__metadata__':{'manifest':5}},
        {**head, '__metadata__':{'manifest':json.dumps(edited(s.manifest, 'spec', {'shape':[2**60]}))}}, {**head, '__metadata__':{'manifest':json.dumps(edited(s.manifest, 'views', 2))}}, {**head, '__metadata__':{}}]
    for nm in ('keys','crc','logits'):
        for k,vs in {'dtype':['F64','O',None,5,'F32'], 'shape':[[], [2**62], [-1], ['4'], None, [10**30], 4, [4,1,5.], [True]], 'data_offsets':[[], [0], [0,2**62], [-8,24], ['0','8'], None, [0,8,9], [0.,32.], 5, [8,0]]}.items():
            bad += [{**head, nm:{**head[nm], k:v}} for v in vs]
        bad += [{**head, nm:v} for v in (None, 5, [], {}, 'x')]
    for o in bad: assert written(o) is None, o
    for h in (0, 1, 7, 2**40, 2**63, 2**64-1, len(b)-8, len(b)):
        p.write_bytes(struct.pack('<Q', h)+b[8:])
        assert check(p, keys) is None
    for o in (b'', b'x', b[:8]):
        p.write_bytes(o)
        assert check(p, keys) is None
    p.write_bytes(b)
    assert check(p, keys)==4

# -- full disk

@posix
def test_disk_full(tmp_path):
    s,keys = TargetStore.create(tmp_path/'s', make_manifest(spec)),keys_of(512)
    import resource
    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000,3000))
        with pytest.raises(OSError, match='making room for 512 items'): TargetWriter(TargetStore(tmp_path/'s'), keys)
    assert os.waitpid(child(no_room), 0)[1]==0 and not s.refresh().parts
    for limit in (4000, 1501, 130, 128):
        def half():
            st = TargetStore(tmp_path/'s')
            todo = keys[st.rows(keys)<0]
            w = TargetWriter(st, todo)
            fill(w, todo[:100])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit,limit))
            with pytest.raises(OSError, match=f"100 of {len(todo)} rows are stored and stay valid; make room") as e: fill(w, todo[100:])
            assert e.value.errno==errno.EFBIG
        before = len(s.refresh())
        assert os.waitpid(child(half), 0)[1]==0
        assert check(tmp_path/'s', keys)==before+100
    todo = keys[s.refresh().rows(keys)<0]
    with TargetWriter(s, todo) as w: fill(w, todo)
    assert check(tmp_path/'s', keys)==512

@pytest.mark.parametrize('k', ['acc','xsum','logits','mean','crc'])
def test_no_space_left(tmp_path, monkeypatch, k):
    "Any write may fail half way; the batch is then not there, the others are"
    s,keys,real = TargetStore.create(tmp_path/'s', make_manifest(spec)),keys_of(32),write.write_rows
    with TargetWriter(s, keys) as w:
        fill(w, keys[:10])
        def full(f, rows, data, start):
            if f is not w._files[k][0] or not data.any(): return real(f, rows, data, start)
            real(f, rows[:3], data[:3], start)
            f.seek(start+int(rows[3])*data[0].nbytes); f.write(data[3].tobytes()[:2])
            raise OSError(errno.ENOSPC, 'No space left on device')
        monkeypatch.setattr(write, 'write_rows', full)
        with pytest.raises(OSError, match=f"No space left on device, writing '{k}.npy' in .*: 10 of 32 rows are stored and stay valid; make room and run again") as e: fill(w, keys[10:20])
        assert e.value.errno==errno.ENOSPC
        monkeypatch.undo()
        assert check(tmp_path/'s', keys)==10
        fill(w, keys[10:])
    assert check(tmp_path/'s', keys)==32

def test_no_room(tmp_path, monkeypatch):
    s,_ = make(tmp_path/'s')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('U', (), {'free':1000}))
    with pytest.raises(OSError, match="the targets of 500 items need .* MB, .* choose another path or a smaller kind") as e: TargetWriter(s, keys_of(500, 100))
    assert e.value.errno==errno.ENOSPC
    monkeypatch.undo()
    TargetWriter(s, keys_of(500, 100)).close()
    # a packed file is there as a whole or not at all
    monkeypatch.setattr(os, 'fsync', lambda f: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
    with pytest.raises(OSError): s.pack(tmp_path/'p.safetensors')
    assert not list(tmp_path.glob('p.*'))

# -- any order of things

kinds = [dict(kind='dense', shape=[5]), dict(kind='sparse', shape=[40], T=2., k=6), dict(kind='dense8', shape=[3,4]), dict(kind='dense', shape=[], task='regress'),
    dict(kind='dense', shape={'a':[3],'b':[2,2]}, task={'a':'softmax','b':'regress'}), dict(kind='features', shape=[4])]
def say(sp, keys, view):
    "Outputs of some teacher"
    def one(shape, i): return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed((int(k)+i*7+int(v)*13)%2**63)) for k,v in zip(keys, view)])
    return {n:one(o, i) for i,(n,o) in enumerate(sp['shape'].items())} if isinstance(sp['shape'], dict) else one(sp['shape'], 0)

@pytest.mark.parametrize('seed', range(24))
def test_each_answer_stays_with_its_item(tmp_path, seed):
    rng,sp = np.random.default_rng(seed),kinds[seed%len(kinds)]
    views,keys,m = int(rng.integers(1, 4)),keys_of(40, 1000*seed),{}
    man = make_manifest(sp, views=views, seed=seed)
    def bits(s, k, v): return {n:o[0].tobytes() for n,o in s.fields(s.rows(np.array([k], np.uint64), v)).items()}
    def same(s, has):
        for v in range(views):
            k = rng.permutation(keys)
            r = s.rows(k, v)
            assert [(int(i),v) in has for i in k]==(r>=0).tolist()
            f = s.fields(r[r>=0])
            for j,i in enumerate(k[r>=0]): assert {n:o[j].tobytes() for n,o in f.items()}==has[int(i),v]
        assert s.verify(bar=quiet)==len(has)
    s = TargetStore.create(tmp_path/'s', man)
    for step in range(int(rng.integers(2, 5))):
        if rng.random()<.5: s = TargetStore(tmp_path/'s')
        claim = rng.permutation(keys)[:rng.integers(1, 30)]
        todo = [(int(k),v) for k in claim for v in range(views) if (int(k),v) not in m]
        todo = [todo[i] for i in rng.permutation(len(todo))][:rng.integers(0, len(todo)+1)]
        with TargetWriter(s, claim) as w:
            while todo:
                n = int(rng.integers(1, 9))
                k,v = np.array([o for o,_ in todo[:n]], np.uint64),np.array([o for _,o in todo[:n]])
                todo = todo[n:]
                out = say(sp, k, v)
                w.put(k, out, v)
                want = encode(sp['kind'], out, sp, seeds=k*np.uint64(views)+v.astype(np.uint64)+np.uint64(seed*0x9E3779B97F4A7C15%2**64))
                m.update({(int(k[i]),int(v[i])):{n:o[i].tobytes() for n,o in want.items()} for i in range(len(k))})
        same(s, m)
    same(TargetStore(tmp_path/'s'), m)
    if not m: return
    same(s.pack(tmp_path/'p.safetensors'), m)
    full = np.array([k for k in keys if (int(k),0) in m], np.uint64)
    half = rng.permutation(full)[:len(full)//2]
    of = lambda ks: {(k,v):o for (k,v),o in m.items() if k in set(map(int, ks))}
    rest = np.setdiff1d(full, half)
    a,b = s.subset(half, tmp_path/'a'),TargetStore(tmp_path/'p.safetensors').subset(rest, tmp_path/'b')
    same(a, of(half)); same(b, of(rest))
    same(TargetStore.merge([a,b.pack(tmp_path/'q.safetensors')], tmp_path/'c'), of(full))
    with pytest.raises(ValueError, match='holds stored targets already'): a.subset(half, tmp_path/'c')
    if len(half):
        with pytest.raises(ValueError, match='share items'): TargetStore.merge([s,a], tmp_path/'d')
    assert not (tmp_path/'d').exists()

def test_reading_leaves_no_trace(tmp_path):
    "As from a read-only medium"
    s,keys = make(tmp_path/'s', n=8, parts=2)
    p = s.pack(tmp_path/'p.safetensors').path
    look = lambda: {o:(o.stat().st_mtime_ns,o.stat().st_size) for o in tmp_path.rglob('*')}
    before = look()
    for o in (tmp_path/'s', p):
        st = TargetStore(o).warm()
        st.get(st.rows(keys)); st.verify(bar=quiet); st.info(); repr(st)
    assert look()==before

def test_pickle(tmp_path):
    s,keys = make(tmp_path/'s')
    for o in (s, s.pack(tmp_path/'p.safetensors')):
        b = pickle.dumps(o)
        c = pickle.loads(b)
        assert len(b)<400 and c.read_only==o.read_only and c.url==o.url and torch.equal(c.get(c.rows(keys)), s.get(s.rows(keys)))

# -- remote

def served(d, copy): return {o.relative_to(d/copy).as_posix():o.stat().st_ino for o in (d/copy).rglob('*') if o.is_file()}

def remote(fs, base, opts, tmp_path):
    "A folder and a packed file, read, read again, changed, gone"
    s,keys = make(tmp_path/'s', n=6, parts=2)
    p,want,cache = s.pack(tmp_path/'p.safetensors'),s.get(s.rows(keys)),tmp_path/'cache'
    fs.put(str(tmp_path/'s'), f'{base}/s', recursive=True)
    fs.put(str(p.path), f'{base}/p.safetensors')
    fs.pipe(f'{base}/s/notes.txt', b'not ours')
    proto = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    for url in (f'{proto}://{base}/s', f'{proto}://{base}/p.safetensors'):
        open_ = lambda: TargetStore(url, cache_dir=cache, storage_options=opts)
        r = open_()
        assert torch.equal(r.get(r.rows(keys)), want) and r.verify(bar=quiet)==6 and r.read_only and r.url==url
        assert {o.name for o in cache.rglob('*') if o.is_file()}<={'lock','fetched.json','p.safetensors','manifest.json','keys.npy',*(f'{o}.npy' for o in s._files)}
        with pytest.raises(ValueError, match='can only be read'): TargetWriter(r, keys)
        with pytest.raises(ValueError, match='written to a local folder'): TargetStore.create(url, s.manifest)
        c = pickle.loads(pickle.dumps(r))
        assert c.read_only and c.url==url
        have = served(r.path.parent, '.')
        assert served(open_().path.parent, '.')==have
        # a copy that was cut is fetched again
        f = r.path if r.packed else r.path/'000000'/'logits.npy'
        f.write_bytes(f.read_bytes()[:-3])
        r = open_()
        assert torch.equal(r.get(r.rows(keys)), want)
    # items are added, and a part is replaced
    new = keys_of(3, 100)
    with TargetWriter(s, new) as w: fill(w, new)
    have = served(cache, '.')
    fs.rm(f'{base}/s/000001', recursive=True)
    fs.put(str(tmp_path/'s'/'000002'), f'{base}/s/000002', recursive=True)
    r = TargetStore(f'{proto}://{base}/s', cache_dir=cache, storage_options=opts)
    assert len(r)==6 and (r.rows(new)>=0).all() and (r.rows(keys)>=0).sum()==3
    assert {k:i for k,i in served(cache, '.').items() if '000000' in k}=={k:i for k,i in have.items() if '000000' in k}
    time.sleep(1.1) # S3 tells ages in seconds
    q,_ = make(tmp_path/'other', n=6, seed=5)
    fs.put(str(q.pack(tmp_path/'q.safetensors').path), f'{base}/p.safetensors')
    r = TargetStore(f'{proto}://{base}/p.safetensors', cache_dir=cache, storage_options=opts)
    assert r.seed==5 and r.verify(bar=quiet)==6
    for nm in ('none', 'none.safetensors', 's/000000'):
        with pytest.raises(FileNotFoundError, match='no stored targets at'): TargetStore(f'{proto}://{base}/{nm}', cache_dir=cache, storage_options=opts)
    fs.rm(f'{base}/p.safetensors')
    with pytest.raises(FileNotFoundError): TargetStore(f'{proto}://{base}/p.safetensors', cache_dir=cache, storage_options=opts)

def test_remote_memory(tmp_path):
    fs = pytest.importorskip('fsspec').filesystem('memory')
    remote(fs, f'b{time.time_ns()}', None, tmp_path)

def test_remote_s3(tmp_path, monkeypatch):
    s3fs,moto = pytest.importorskip('s3fs'),pytest.importorskip('moto.server')
    for k,v in dict(AWS_ACCESS_KEY_ID='x', AWS_SECRET_ACCESS_KEY='x', AWS_DEFAULT_REGION='eu-west-1').items(): monkeypatch.setenv(k, v)
    server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    try:
        opts = dict(key='x', secret='x', client_kwargs=dict(endpoint_url='http://{}:{}'.format(*server.get_host_and_port()), region_name='eu-west-1'))
        fs = s3fs.S3FileSystem(**opts, use_listings_cache=False)
        fs.mkdir('bucket')
        remote(fs, 'bucket/t', opts, tmp_path)
    finally: server.stop()

@pytest.mark.parametrize('nm', ['../out.npy', '000000/../../out.npy', '..\\out.npy', 'c:/out.npy'])
def test_remote_names_lead_out(tmp_path, monkeypatch, nm):
    fs = pytest.importorskip('fsspec').filesystem('memory')
    base = f'/b{time.time_ns()}'
    fs.pipe(f'{base}/manifest.json', b'{}')
    monkeypatch.setattr(type(fs), 'find', lambda self, root, **kw: {f'{root}/{o}':dict(size=2, type='file') for o in ('manifest.json',nm)})
    with pytest.raises(ValueError, match='whose name leads out of its folder'): TargetStore(f'memory:/{base}', cache_dir=tmp_path/'c')
    assert not list((tmp_path).rglob('*.npy'))

def test_remote_needs_fsspec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fsspec', None); monkeypatch.setitem(sys.modules, 'fsspec.core', None)
    with pytest.raises(ImportError, match=r"pip install 'fastkd\[remote\]'"): TargetStore('s3://bucket/x', cache_dir=tmp_path)
