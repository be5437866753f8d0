"""What a run says of itself: its first line, and one a step."""

from omegaconf import OmegaConf

from darts.config import DartsConfig
from darts.training.lines import banner, progress_line


def test_the_banner_says_what_is_on():
    config = OmegaConf.create(
        {
            "algorithm": {"rollout_correction": {"bypass_mode": False}},
            "reward": {"reward_model": {"enable": False}},
            "actor_rollout_ref": {"actor": {"strategy": "fsdp2"}},
        }
    )
    darts = DartsConfig.from_block({"allocation": {"mode": "uniform", "mean_candidates": 10.5, "high": 11}}, 8)
    assert "plugin active: M=8 of 10.5 candidates (uniform, 8 to 11)" in banner(config, darts)
    assert "K=7 shortest and L=1 longest" in banner(config, darts)
    assert banner(config, darts).endswith("; log-probs after generation")
    config.algorithm.rollout_correction.bypass_mode = True
    assert "; log-probs after generation (with algorithm.rollout_correction.bypass_mode=True" in banner(config, darts)
    line = banner(config, DartsConfig.from_block({"overlap": {"mode": "token"}}, 8), cache_tokens=12_000)
    assert line.endswith("during generation (overlap token, prefixes of up to 12,000 tokens on a rank)")
    line = banner(config, DartsConfig.from_block({"preset": "fast"}, 8))
    assert "M=8 of candidates as planned (uniform, 8 to 16), selection dual_end: K=7 shortest and L=1 longest" in line
    assert "(cut, wait: deadline), early stop eager (no group is shortest-only: it never acts), spare prompts " in line
    assert "spare prompts 5%;" in banner(config, DartsConfig.from_block({"spare_prompts": 0.05}, 8))
    line = banner(config, DartsConfig.from_block({"allocation": {"mean_candidates": "utility"}}, 8))
    assert "M=8 of as many candidates as pay (adaptive, 8 to 16)" in line
    off = DartsConfig.from_block({"enable": False}, 8)
    assert banner(config, off) == "plugin active, darts.enable=false: plain verl"


def test_a_progress_line_leaves_out_what_was_not_measured():
    assert progress_line({"timing_s/step": 3.21}, 2, 10) == "step 2/10: 3.2 s"


def test_a_progress_line_says_what_its_figures_are_of_with_and_without_rewards_of_the_pool():
    lengths = {"darts/length/pool_mean": 39, "darts/length/kept_mean": 33, "darts/length/pool_max": 64}
    kept, pool = {"darts/reward/kept_mean": 0.05}, {"darts/reward/pool_mean": 0.4}
    line = "step 1/2: mean length 39, of the kept 33, longest 64, "
    assert progress_line(lengths | kept, 1, 2) == line + "reward of the kept 0.05"
    assert progress_line(lengths | kept | pool, 1, 2) == line + "reward 0.40, of the kept 0.05"
