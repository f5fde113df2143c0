"The losses between layers, written down plainly: vectorised torch without any care for dead channels, equal items, half precision or wrong shapes"
import math,torch
import torch.nn.functional as F

plain_forms = {}
def plain(f): plain_forms[f.__name__] = f; return f

@plain
def hint(s, t): return F.mse_loss(s, t)
@plain
def simkd(s, t): return F.mse_loss(s, t)
@plain
def hidden(s, t): return F.mse_loss(s, t)
@plain
def wkd_feat(s, t):
    def sd(x): return (x.var((2,3))+1e-5).sqrt()
    return (2*(s.mean((2,3))-t.mean((2,3))).pow(2)+(sd(s)-sd(t)).pow(2)).sum(1).mean()
def amap(x): return F.normalize(x.pow(2).mean(1).flatten(1))
@plain
def at(s, t): return (amap(s)-amap(t)).norm(dim=1).mean()
@plain
def attention(s, t): return (amap(s)-amap(t)).pow(2).mean()
@plain
def catkd(s, t):
    def cam(x): return F.normalize(F.adaptive_avg_pool2d(x, 2).flatten(2), dim=2)
    return F.mse_loss(cam(s), cam(t))
@plain
def ab(s, t): return torch.where(t>0, 1-s, 1+s).relu().pow(2).sum()/len(s)
@plain
def ofd(s, t):
    neg = (t<0).float()
    t = torch.maximum(t, ((t*neg).sum((0,2,3))/neg.sum((0,2,3)))[:,None,None])
    return ((s-t).pow(2)*((s>t)|(t>0))).sum()/len(s)
@plain
def fsp(s, t):
    def flow(a, b): return a.flatten(2)@b.flatten(2).mT/a[0,0].numel()
    return (flow(*s)-flow(*t)).pow(2).sum((1,2)).mean()
@plain
def nst(s, t):
    s,t = F.normalize(s.flatten(2), dim=2),F.normalize(t.flatten(2), dim=2)
    def k(a, b): return (a@b.mT).pow(2).mean((1,2))
    return (k(s,s)+k(t,t)-2*k(s,t)).mean()
@plain
def affinity(s, t):
    def gram(x): x = F.normalize(x.flatten(2), dim=1); return x.mT@x
    return F.mse_loss(gram(s), gram(t))
@plain
def ickd(s, t):
    def corr(x): x = x.flatten(2); return F.normalize(x@x.mT, dim=2)
    return F.mse_loss(corr(s), corr(t))
@plain
def vid(s, t): return (((s[0]-t).pow(2)/s[1]+s[1].log())/2).mean()
@plain
def pad(s, t): return ((t-s[0]).pow(2)/(1e-6+s[1].exp())+s[1]).mean()
@plain
def ft(s, t): return (F.normalize(s.flatten(1))-F.normalize(t.flatten(1))).abs().sum(1).mean()
@plain
def kta(s, t): return ft(s, t)
@plain
def norm(s, t): return s.flatten(1).abs().sum(1).mean()
@plain
def reviewkd(s, t):
    ks = [k for k in (4,2,1) if k<s.shape[2]]
    parts = [F.mse_loss(s, t)]+[F.mse_loss(F.adaptive_avg_pool2d(s, k), F.adaptive_avg_pool2d(t, k)) for k in ks]
    return sum(.5**i*o for i,o in enumerate(parts))/sum(.5**i for i in range(len(parts)))
@plain
def mgd(s, t, net): return 7e-5*F.mse_loss(net(s*(torch.rand(*s.shape[:2], 1, 1, device=s.device)>=.15)), t, reduction='sum')/len(s)
@plain
def srd(s, t): return 2*(s-t).abs().pow(4).sum().log()
@plain
def nd(s, t, targ, centers):
    return (1-(s*F.normalize(centers)[targ]).sum(1)/torch.maximum(s.norm(dim=1), t.norm(dim=1))).mean()
@plain
def dist_plus(s, t):
    def rho(a, b, dim): return F.cosine_similarity(a-a.mean(dim, keepdim=True), b-b.mean(dim, keepdim=True), dim)
    (fs,zs),(ft,zt) = s,t
    p,q = zs.softmax(1),zt.softmax(1)
    return 4-rho(p, q, 1).mean()-rho(p, q, 0).mean()-rho(fs, ft, 1).mean()-rho(fs.sum(1).flatten(1), ft.sum(1).flatten(1), 0).mean()
@plain
def rkd(s, t):
    def parts(x):
        x = x.flatten(1)
        d,e = torch.cdist(x, x),F.normalize(x[None]-x[:,None], dim=2)
        return d/d[d>0].mean(),e@e.mT
    (ds,es),(dt,et) = parts(s),parts(t)
    return F.smooth_l1_loss(ds, dt)+2*F.smooth_l1_loss(es, et)
@plain
def sp(s, t):
    def g(x): x = x.flatten(1); return F.normalize(x@x.T)
    return F.mse_loss(g(s), g(t))
@plain
def pkt(s, t):
    def p(x):
        x = F.normalize(x.flatten(1))
        k = ((x@x.T+1)/2)*(1-torch.eye(len(x), device=x.device))
        return k/k.sum(1, keepdim=True)
    q,p = p(s),p(t)
    return (p*((p+1e-7)/(q+1e-7)).log()).sum(1).mean()
@plain
def cc(s, t):
    def k(x):
        g = F.normalize(x.flatten(1))
        g = .8*(g@g.T)
        return math.exp(-.8)*(1+g+g**2/2)
    return F.mse_loss(k(s), k(t))
@plain
def cka(s, t):
    def g(x): x = x.flatten(1); x = x-x.mean(0); return x@x.T
    k,l = g(s),g(t)
    return 1-(k*l).sum()/(k.norm()*l.norm())
@plain
def skd_direction(s, t):
    def g(x): x = F.normalize(x); return x@x.T
    d = g(s)-g(t)
    return (d@torch.linalg.inv(torch.cov(d.T)+.1*torch.eye(len(d), device=d.device))*d).sum(1).sqrt().mean()
def turned(z): return F.normalize(z.unflatten(0, (-1,4))[:,1:].flatten(0, 1))@F.normalize(z[::4]).T
def own_upright(n, x): return torch.arange(n, device=x.device).repeat_interleave(3)
@plain
def aux_sskd(s, t): return F.cross_entropy(turned(s), own_upright(len(s)//4, s))
@plain
def sskd(s, t, targ):
    (zs,es),(zt,et),n = s,t,len(targ)
    def kl(a, b, T): return T**2*(b.div(T).softmax(1)*(b.div(T).log_softmax(1)-a.div(T).log_softmax(1))).sum(1)
    def kept(z, y, r):
        rank = (z>z.gather(1, y[:,None])).sum(1)
        keep = torch.zeros(len(z), device=z.device)
        keep[rank.argsort(stable=True)[:(rank==0).sum()+((rank>0).sum()*r).long()]] = 1
        return keep
    def kl_kept(a, b, T, y, r): return (kl(a, b, T)*(keep:=kept(b, y, r))).sum()/keep.sum()
    def aug(z): return z.unflatten(0, (-1,4))[:,1:].flatten(0, 1)
    return (.1*F.cross_entropy(zs[::4], targ)+.9*kl(zs[::4], zt[::4], 4).mean()+10*kl_kept(turned(es), turned(et), .5, own_upright(n, zs), .75)
        +2.7*kl_kept(aug(zs), aug(zt), 4, targ.repeat_interleave(3), 1.))

class PlainCRD:
    "CRD from all items but for its own; the first call sets Z"
    def __init__(self, n_items, d=128, k=16384, T=.07):
        self.n,self.k,self.T,self.Z = n_items,k,T,[None,None]
        self.banks = [(torch.rand(n_items, d)*2-1)*math.sqrt(3/d) for _ in range(2)]
    def to(self, device): self.banks = [o.to(device) for o in self.banks]; return self
    def __call__(self, s, t, targ, index):
        idx,m,loss = torch.cat([index[:,None],torch.randint(self.n, (len(s),self.k), device=s.device)], 1),self.k/self.n,0.
        vs = [F.normalize(s),F.normalize(t)]
        for i,(v,bank) in enumerate(zip(vs, self.banks[::-1])):
            o = ((bank[idx]@v[:,:,None])[...,0]/self.T).exp()
            if self.Z[i] is None: self.Z[i] = o.mean().item()*self.n
            o = o/self.Z[i]
            loss = loss-((o[:,0]/(o[:,0]+m)).log()+(m/(o[:,1:]+m)).log().sum(1)).mean()
        for v,bank in zip(vs, self.banks): bank[index] = F.normalize(.5*bank[index]+.5*v.detach())
        return loss
