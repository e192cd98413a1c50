"""What the main process decides is what all do."""

import multiprocessing
import traceback

from ddetr_d2.errors import UserError
from ddetr_d2.main_process import on_main_process

import pytest
import torch.distributed


def decide(rank, file, answers):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )

    def refuse():
        raise UserError(f"refused by {rank}")

    try:
        result = on_main_process(lambda: f"chosen by {rank}")
        with pytest.raises(UserError) as caught:
            on_main_process(refuse)
        answers.put((result, str(caught.value)))
    except BaseException:
        answers.put(traceback.format_exc())


def test_all_processes_get_what_the_main_process_says(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=decide, args=(rank, tmp_path / "store", answers), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        assert answers.get(timeout=60) == ("chosen by 0", "refused by 0")


def test_a_single_process():
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        on_main_process(lambda: (_ for _ in ()).throw(UserError("no")))
