"""optim.sparse_rows for every model that has tables of items or users: the gradients of the rows that a batch
reads are those of the whole table, or the model is refused."""

import pytest
import torch

from tests.contract.draws import RepeatingDraws
from tests.contract.models import TRAINED, new_model, no_dropout, training_batches
from trainer.config import OptimConfig
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError
from trainer.models.layers.embedding import ItemTable, tables_by_rows
from trainer.training.sparse_rows import SparseRows, take_apart

REFUSED = {"bert4rec", "bsr", "gru4rec", "query_seqrec", "sasrec"}  # their loss scores every item


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_the_rows_are_those_of_the_table(name: str, texts: PreparedFolder) -> None:
    whole, rows = (new_model(name, texts, *no_dropout(name)).train() for _ in range(2))
    if not any(isinstance(module, ItemTable) for module in rows.modules()):
        with pytest.raises(ConfigError, match="no table of that many items or users"):
            take_apart(rows, 1)
        return
    batch = training_batches(name, texts, 32, 32)[0]
    with RepeatingDraws():
        whole(whole.prepare(batch))[0].backward()
    take_apart(rows, 1)
    if name in REFUSED:
        with pytest.raises(ConfigError, match="every row has a gradient"):
            rows(rows.prepare(batch))
        return
    with RepeatingDraws():
        rows(rows.prepare(batch))[0].backward()
    sparse = SparseRows(tables_by_rows(rows), OptimConfig())
    sparse.gather()
    parameters = dict(whole.named_parameters())
    assert sparse.weight.keys() | dict(rows.named_parameters()).keys() == parameters.keys()
    for key, weight in sparse.weight.items():
        assert weight.grad is not None and weight.grad.is_sparse
        torch.testing.assert_close(weight.grad.to_dense(), parameters[key].grad, rtol=1e-5, atol=1e-7)
    for key, parameter in rows.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[key].grad, rtol=1e-5, atol=1e-7)
