"""One local Ray and verl's real vLLM servers on the testbed's trained model, without a trainer."""

import pytest
from engine_state import EngineState, engine_config, local_ray, start_servers


@pytest.fixture(scope="package")
def engine_ray():
    """Logical GPUs for `engine` and `two_engines` at a time."""
    with local_ray(num_gpus=3):
        yield


@pytest.fixture(scope="package")
def replica_class():
    """What serves; None for what verl's registry says."""
    from verl_patches.vllm_stream_server import StreamingReplica

    return StreamingReplica


@pytest.fixture(scope="package")
def engine(engine_ray, replica_class):
    """verl's `LLMServerManager` with one running server, `engine.server_handles[0]`."""
    with start_servers(engine_config(), replica_class) as manager:
        yield manager


@pytest.fixture(scope="module")
def two_engines(engine_ray, replica_class):
    """The same with two servers, which share the two cores."""
    with start_servers(engine_config(replicas=2), replica_class, start_rank=1) as manager:
        yield manager


@pytest.fixture
def server(engine):
    """The one server, idle before and after the test, with an empty prefix cache and token log."""
    server = engine.server_handles[0]
    EngineState.wait_idle(server)
    EngineState.reset(server)
    yield server
    EngineState.wait_idle(server)
