"""What a second node may see of the data: a change that jobs make before they start."""

import os

from megatron_periln.training.datasets import index_cache


def on_the_second_rank():
    if os.environ["RANK"] == "1":
        index_cache.content_of = lambda prefix: {"modified": "at another time"}
