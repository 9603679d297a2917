import math

import pytest
import torch

from qwench.errors import TextError
from qwench.evaluation.statistics import Mean, clustered_mean, exponential, quantile


def test_equal_documents_give_the_plain_standard_error_of_their_means():
    values = torch.tensor([1.0, 3.0, 2.0, 6.0, 5.0, 7.0])
    documents = torch.tensor([4, 4, 7, 7, 9, 9])
    means = [2.0, 4.0, 6.0]
    deviation = math.sqrt(sum((m - 4.0) ** 2 for m in means) / (3 - 1))
    result = clustered_mean(values, documents)
    assert result.mean == pytest.approx(4.0, abs=1e-12)
    assert result.standard_error == pytest.approx(deviation / math.sqrt(3), abs=1e-12)


def test_unequal_documents_follow_the_literal_formula():
    groups = {3: [0.5, 0.25, 4.0, 1.0], 1: [2.0], 8: [3.0, 5.0]}
    values = torch.tensor([v for group in groups.values() for v in group])
    documents = torch.tensor([name for name, group in groups.items() for _ in group])
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(3))
    total = sum(len(group) for group in groups.values())
    mean = sum(sum(group) for group in groups.values()) / total
    squares = sum((sum(group) - mean * len(group)) ** 2 for group in groups.values())
    result = clustered_mean(values[shuffled], documents[shuffled])
    assert result.mean == pytest.approx(mean, abs=1e-12)
    assert result.standard_error == pytest.approx(math.sqrt(3 / 2 * squares) / total, abs=1e-12)


def test_standard_error_covers_the_truth_where_one_over_tokens_would_not():
    """Documents of 40 correlated tokens: the spread of many means is what the formula says, and six times what tokens would say."""
    generator = torch.Generator().manual_seed(11)
    means, claims = [], []
    for _ in range(400):
        values = torch.randn(12, 1, generator=generator) + 0.1 * torch.randn(12, 40, generator=generator)
        result = clustered_mean(values.flatten(), torch.arange(12).repeat_interleave(40))
        means.append(result.mean)
        claims.append(result.standard_error)
    spread = float(torch.tensor(means).std())
    assert sum(claims) / len(claims) == pytest.approx(spread, rel=0.1)


def test_one_document_has_no_standard_error():
    with pytest.raises(TextError, match="1 document"):
        clustered_mean(torch.ones(5), torch.zeros(5, dtype=torch.int64))


def test_booleans_count_as_shares():
    result = clustered_mean(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 1]))
    assert result.mean == 0.75


def test_exponential_by_the_delta_method():
    result = exponential(Mean(1.5, 0.02))
    assert result.mean == pytest.approx(math.exp(1.5))
    assert result.standard_error == pytest.approx(math.exp(1.5) * 0.02)


@pytest.mark.parametrize(("share", "expected"), [(0.99, 989.0), (0.999, 998.0), (1.0, 999.0), (0.0005, 0.0)])
def test_quantiles_are_values_that_occurred(share, expected):
    values = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert quantile(values, share) == expected
