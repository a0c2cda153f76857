"""Operators against dense matrices, linear_operator's own contract, and the size of what they factorise."""

import unittest

import pytest
import torch
from gpytorch_settings import botorch_off, botorch_on
from linear_operator.operators import BlockDiagLinearOperator, DenseLinearOperator, DiagLinearOperator
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from torch.testing import assert_close

from gpytorch_dnn2gp.operators import Covariance, FeatureGram, NoisyFeatureGram

F64 = torch.float64
# n, K, P, batch: either side of n K = P, one output and several, batches of one operand alone
CASES = {
    "features": (5, 1, 3, (), ()),
    "examples": (3, 1, 7, (), ()),
    "features_outputs": (4, 3, 5, (), ()),
    "examples_outputs": (2, 3, 9, (), ()),
    "square": (3, 2, 6, (), ()),
    "batch": (4, 2, 3, (2,), (2,)),
    "batch_of_roots": (4, 2, 3, (2,), ()),
    "batch_of_blocks": (2, 2, 6, (), (3,)),
    "double_batch": (3, 2, 4, (2, 3), (1, 3)),
}


def parts(n, k, p, root_batch, block_batch, dtype=F64):
    root = torch.randn(*root_batch, n * k, p, dtype=dtype)
    a = torch.randn(*block_batch, n, k, k, dtype=dtype)
    return root, a @ a.mT + 0.5 * torch.eye(k, dtype=dtype)


def dense(root, blocks):
    """By loops: phi phi^T with D_i at its places."""
    batch = torch.broadcast_shapes(root.shape[:-2], blocks.shape[:-3])
    n, k = blocks.shape[-3:-1]
    noise = torch.zeros(*batch, n * k, n * k, dtype=root.dtype)
    for i in range(n):
        noise[..., i * k : (i + 1) * k, i * k : (i + 1) * k] = blocks[..., i, :, :]
    return root @ root.mT + noise


@pytest.mark.parametrize("case", CASES)
def test_everything_equals_the_dense_matrix(case):
    root, blocks = parts(*CASES[case])
    a, op = dense(root, blocks), NoisyFeatureGram(root, blocks)
    rhs = torch.randn(*a.shape[:-1], 2, dtype=F64)
    solved = torch.linalg.solve(a, rhs)
    assert_close(op.to_dense(), a)
    assert_close(op @ rhs, a @ rhs)
    assert_close(op.diagonal(dim1=-1, dim2=-2), a.diagonal(dim1=-1, dim2=-2))
    assert_close(op.solve(rhs), solved)
    assert_close(op.solve(rhs, rhs.mT), rhs.mT @ solved)
    assert_close(op.logdet(), torch.logdet(a))
    quadratic, log_det = op.inv_quad_logdet(rhs, logdet=True)
    assert_close(quadratic, (rhs * solved).sum((-2, -1)))
    assert_close(log_det, torch.logdet(a))
    assert_close(op.inv_quad(rhs, reduce_inv_quad=False), (rhs * solved).sum(-2))
    assert_close(op.weights(rhs), root.mT @ solved)
    new = torch.randn(4, root.shape[-1], dtype=F64)
    cross = new @ root.mT
    assert_close(op.conditional_gram(new), new @ new.mT - cross @ torch.linalg.solve(a, cross.mT))


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    root, blocks = parts(*CASES[case])
    rhs = torch.randn(*torch.broadcast_shapes(root.shape[:-2], blocks.shape[:-3]), root.shape[-2], 1, dtype=F64)
    new = torch.randn(2, root.shape[-1], dtype=F64)
    inputs = [t.requires_grad_() for t in (root, blocks, rhs)]

    def values(root, blocks, rhs):
        op = NoisyFeatureGram(root, (blocks + blocks.mT) / 2)
        return *op.inv_quad_logdet(rhs, logdet=True), op.solve(rhs), op.weights(rhs), op.conditional_gram(new), op @ rhs

    assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("k", [1, 2])
def test_noise_makes_a_noisy_gram_of_a_gram(k):
    root, blocks = parts(4, k, 3, (), ())
    gram, noise = FeatureGram(root), BlockDiagLinearOperator(DenseLinearOperator(blocks))
    variances = torch.rand(4 * k, dtype=F64)
    one = torch.ones((), dtype=F64)
    for op, expected in [
        (gram + noise, dense(root, blocks)),
        (gram + DiagLinearOperator(variances), root @ root.mT + variances.diag()),
        (gram.add_diagonal(one), root @ root.mT + torch.eye(4 * k, dtype=F64)),
        (gram.add_jitter(0.5), root @ root.mT + 0.5 * torch.eye(4 * k, dtype=F64)),
        (gram * 2.0 + noise, root @ root.mT + dense(root, blocks)),
        ((gram + noise) * 2.0, 2 * dense(root, blocks)),
        (gram + noise + noise, 2 * dense(root, blocks) - root @ root.mT),
        ((gram + noise).add_diagonal(variances), dense(root, blocks) + variances.diag()),
        (gram + noise + DiagLinearOperator(variances), dense(root, blocks) + variances.diag()),
    ]:
        assert isinstance(op, NoisyFeatureGram)
        assert_close(op.to_dense(), expected)


def test_noise_that_is_not_positive_definite_is_named():
    root, blocks = parts(4, 2, 3, (), ())
    blocks[2] = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)
    with pytest.raises(ValueError, match="index 2 is not positive definite"):
        NoisyFeatureGram(root, blocks).logdet()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_root_of_a_gram_is_exact(shape):
    root = torch.randn(*shape, dtype=F64)
    factor = FeatureGram(root).root_decomposition().root.to_dense()
    assert factor.shape[-1] == min(shape)
    assert_close(factor @ factor.mT, root @ root.mT)


# ---- linear_operator's contract: its own suite, in single precision


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch, once in a process
class _Contract:
    should_call_cg = False  # closed forms instead
    batch, k, p = (), 1, 3
    settings = staticmethod(botorch_off)

    def setUp(self):
        super().setUp()
        self.enterContext(self.settings())

    def create_linear_op(self):
        root, blocks = parts(6, self.k, self.p, self.batch, self.batch, torch.float32)
        return NoisyFeatureGram(root.requires_grad_(), blocks.requires_grad_())

    def evaluate_linear_op(self, op):
        return dense(op.root, op.blocks)


class TestNoisyFeatureGram(_Contract, LinearOperatorTestCase, unittest.TestCase):
    pass


class TestNoisyFeatureGramWide(_Contract, LinearOperatorTestCase, unittest.TestCase):
    p = 9


class TestNoisyFeatureGramOutputs(_Contract, LinearOperatorTestCase, unittest.TestCase):
    k, p = 2, 5


class TestNoisyFeatureGramBatch(_Contract, LinearOperatorTestCase, unittest.TestCase):
    batch, k, p = (2,), 2, 4


class TestNoisyFeatureGramDoubleBatch(_Contract, LinearOperatorTestCase, unittest.TestCase):
    batch, k, p = (2, 3), 1, 4


class _GramContract(_Contract):
    should_call_cg = True  # a Gram without noise is singular in general, and solved with as linear_operator does
    should_call_lanczos = False  # it has a root

    def create_linear_op(self):
        return FeatureGram(torch.randn(*self.batch, 5, 5).add(4 * torch.eye(5)).requires_grad_())

    def evaluate_linear_op(self, op):
        return op.root @ op.root.mT


class TestFeatureGram(_GramContract, LinearOperatorTestCase, unittest.TestCase):
    pass


class TestFeatureGramBatch(_GramContract, LinearOperatorTestCase, unittest.TestCase):
    batch = (2,)


class TestFeatureGramDoubleBatch(_GramContract, LinearOperatorTestCase, unittest.TestCase):
    batch = (2, 3)


class _CovarianceContract(_Contract):
    should_call_cg = True  # a dense matrix, solved with as linear_operator does
    should_call_lanczos = False  # its root is exact

    def create_linear_op(self):
        root = torch.randn(*self.batch, 5, 5).add(4 * torch.eye(5))
        return Covariance((root @ root.mT).requires_grad_())

    def evaluate_linear_op(self, op):
        return op.tensor


class TestCovariance(_CovarianceContract, LinearOperatorTestCase, unittest.TestCase):
    pass


class TestCovarianceBatch(_CovarianceContract, LinearOperatorTestCase, unittest.TestCase):
    batch = (2,)


class TestCovarianceDoubleBatch(_CovarianceContract, LinearOperatorTestCase, unittest.TestCase):
    batch = (2, 3)


class TestCovarianceAfterBotorch(TestCovariance):
    settings = staticmethod(botorch_on)
    should_call_cg = False


class TestCovarianceBatchAfterBotorch(TestCovarianceBatch):
    settings = staticmethod(botorch_on)
    should_call_cg = False
