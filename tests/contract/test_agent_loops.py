"""Agent loops are built by their class, as Hydra would build them."""

import inspect

import hydra
import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_patches.patches import build, patch_building
from verl_patches.patching import PatchTargetMoved


class Loop:
    def __init__(self, **arguments) -> None:
        self.arguments = arguments


TARGET = f"{__name__}.Loop"


def test_verl_uses_hydra_for_nothing_else_in_that_module(monkeypatch):
    monkeypatch.setattr(agent_loop, "hydra", hydra)
    source = inspect.getsource(agent_loop)
    assert source.count(" hydra.") - source.count(" hydra.utils.instantiate ") == 1
    assert "agent_loop = hydra.utils.instantiate(\n                config=agent_loop_config," in source
    registered = agent_loop._agent_loop_registry["single_turn_agent"]
    assert registered == {"_target_": f"{SingleTurnAgentLoop.__module__}.SingleTurnAgentLoop"}


def test_it_is_applied_once_and_to_that_module_alone(monkeypatch):
    monkeypatch.setattr(agent_loop, "hydra", hydra)
    instantiate = hydra.utils.instantiate
    assert patch_building()
    assert not patch_building()
    assert agent_loop.hydra.utils.instantiate is build
    assert hydra.utils.instantiate is instantiate


def test_it_is_loud_when_verl_builds_loops_in_another_way(monkeypatch):
    monkeypatch.setattr(agent_loop, "hydra", hydra)
    monkeypatch.setattr(agent_loop.AgentLoopWorker, "_run_agent_loop", lambda self: None)
    with pytest.raises(PatchTargetMoved):
        patch_building()


@pytest.mark.parametrize("config", [{"_target_": TARGET}, OmegaConf.create({"name": "own", "_target_": TARGET})])
def test_both_ways_give_the_loop_the_same_arguments(config):
    settings = agent_loop.DictConfigWrap(OmegaConf.create({"a": 1}))
    tools = agent_loop.ToolListWrap([object()])
    built = build(config, trainer_config=settings, tools=tools, processor=None)
    upstream = hydra.utils.instantiate(config=config, trainer_config=settings, tools=tools, processor=None)
    assert type(built) is type(upstream) is Loop
    assert built.arguments == upstream.arguments
    assert built.arguments["trainer_config"] is settings
    assert built.arguments["tools"] is tools
