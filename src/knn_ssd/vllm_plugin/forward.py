"""One draft pass over rows of vLLM's batch: one token per request at its next position, into the target's KV cache.

The slots are those after the tokens that the target has computed. The verification computes these positions again in
every layer before it reads them, so nothing of a draft remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from knn_ssd.plan import Plan
from knn_ssd.vllm_plugin.layers import DecoderStack


class DraftForward:
    """Runs the target's layers over rows of the runner's current batch.

    Args:
        runner: vLLM's model runner.
        stack: the runner's model.
    """

    def __init__(self, runner: Any, stack: DecoderStack) -> None:
        self._runner = runner
        self._stack = stack

    def num_slots(self, row: int) -> int:
        """How many positions of a request have cache slots in every KV cache group."""
        batch = self._runner.input_batch
        tables = [batch.block_table[group] for group in range(len(self._runner.attn_groups))]
        slots = [int(table.num_blocks_per_row[row]) * int(table.block_size) for table in tables]
        return min([*slots, int(self._runner.max_model_len)])

    def logits(
        self, rows: Sequence[int], token_ids: Sequence[int], positions: Sequence[int], plan: Plan
    ) -> torch.Tensor:
        """Logits (n, V) after one token of each of n requests.

        Args:
            rows: the requests' rows in the batch.
            token_ids: (n,) one token of each.
            positions: (n,) the tokens' positions.
            plan: the modes of the sublayers.
        """
        from vllm.forward_context import set_forward_context

        runner = self._runner
        where = torch.tensor(positions, dtype=torch.int64)
        metadata, slots = self._metadata(rows, where)
        with set_forward_context(metadata, runner.vllm_config, num_tokens=len(rows), slot_mapping=slots):
            return self._stack.logits(
                torch.tensor(token_ids, dtype=torch.int64).to(runner.device), where.to(runner.device), plan
            )

    def _metadata(self, rows: Sequence[int], positions: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The attention metadata of each layer, and the slot mapping (n,) of its new keys and values."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        runner, count = self._runner, len(rows)
        starts = torch.arange(count + 1, dtype=torch.int32)
        lengths = (positions + 1).to(torch.int32)
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for index, groups in enumerate(runner.attn_groups):
            table = runner.input_batch.block_table[index]
            size = int(table.block_size)
            blocks = torch.from_numpy(table.get_numpy_array()[np.asarray(rows)])  # (n, max_num_blocks), a copy
            block = blocks.gather(1, (positions // size)[:, None])[:, 0]
            slot_mapping = (block.to(torch.int64) * size + positions % size).to(runner.device)
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(runner.device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(runner.device),
                num_reqs=count,
                num_actual_tokens=count,
                max_query_len=1,
                max_seq_len=int(lengths.max()),
                block_table_tensor=blocks.to(runner.device),
                slot_mapping=slot_mapping,
                causal=True,
                positions=positions.to(runner.device),
                seq_lens_cpu_upper_bound=lengths,
            )
            for group in groups:
                built = group.build_metadata_for_drafting(common, 0)
                for name in group.layer_names:
                    metadata[name], slots[name] = built, slot_mapping
        return metadata, slots
