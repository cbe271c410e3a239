"""A cluster of a zoo: each instance has all models, and requests move with theirs."""

from typing import Any

import chains
import pytest
import zoo
from vkv.runtime.cluster.cluster import Cluster
from vkv.runtime.engine.stats import together

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")
_OPTIONS: dict[str, Any] = {"device": "cpu", **zoo.with_defaults({"kv_memory": "4MiB"})}
_PARTS = {"early": ("layers.0.self_attn",), "late": ("layers.1.mlp", "lm_head")}


def test_models_on_two_instances(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("tenants")
    family = chains.save_family(home, "llama", _PARTS)
    tenants, alone = chains.make_zoo(home, family), chains.Alone(family)
    names, prompts = [*family] * 4, zoo.random_prompts([9 + 5 * i for i in range(12)])
    with Cluster(tenants, model="base", instances=2, threads=1, **_OPTIONS) as cluster:
        chains.check_alone(cluster.generate(prompts, zoo.greedy(12), model=names), names, alone)
        stats = [one.stats for one in cluster.stats().instances if one.stats is not None]
        models = {one.name: one for one in together(stats).models}
        assert models.keys() == {"early", "late"}
    alone.close()
