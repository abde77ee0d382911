"""Muon against the singular value decomposition."""

import torch

from benchmark.laptop import Muon


def test_muons_update_is_the_nearest_orthogonal_matrix_of_nesterovs_momentum():
    torch.manual_seed(0)
    start = {shape: torch.randn(shape) for shape in ((6, 10), (10, 6), (4, 3, 2, 2))}
    weights = {shape: value.clone().requires_grad_() for shape, value in start.items()}
    twin = torch.nn.Parameter(start[6, 10].clone())  # of the same shape: orthogonalised together
    muon = Muon([dict(params=[*weights.values(), twin], lr=0.1, weight_decay=0.5)],
                         torch.float32)
    moments = {shape: torch.zeros(shape) for shape in start}
    for _ in range(2):
        grads = {shape: torch.randn(shape) for shape in start}
        for shape, grad in grads.items():
            weights[shape].grad = grad
            moments[shape] = 0.95 * moments[shape] + 0.05 * grad
        twin.grad = torch.randn(6, 10)
        before = {shape: p.detach().clone() for shape, p in weights.items()}
        muon.step()
    for shape, p in weights.items():
        nesterov = (0.05 * grads[shape] + 0.95 * moments[shape]).flatten(1)
        u, _, v = torch.linalg.svd(nesterov, full_matrices=False)
        update = ((1 - 0.1 * 0.5) * before[shape] - p.detach()).flatten(1)
        update /= 0.1 * 0.2 * max(update.shape) ** 0.5
        values = torch.linalg.svdvals(update)
        assert 0.6 < values.min() and values.max() < 1.3  # Newton-Schulz stops near 1
        assert torch.linalg.norm(u.T @ update @ v.T - torch.diag(values)) < 0.7
        assert ((u @ v) * update).sum() / values.norm() / len(values) ** 0.5 > 0.95
    assert not torch.equal(twin, weights[6, 10])
