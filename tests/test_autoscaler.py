"""What node types can come to, and how it is put in words."""

from pathlib import Path

from launcher.autoscaler import NodeType, most, node_types, told

GPU = NodeType(name="gpu", most=2, resources={"CPU": 96, "GPU": 8, "accelerator_type:H100": 1})
HEAD = NodeType(name="head", most=1, resources={"CPU": 0})


def test_the_most_that_there_can_be() -> None:
    assert most("GPU", 0, [HEAD, GPU]) == (16, "gpu (up to 2)")
    assert most("GPU", 24, [HEAD, GPU]) == (24, "gpu (up to 2)"), "nodes that joined by hand count"
    assert most("GPU", 0, [HEAD]) == (0, "")
    endless = NodeType(name="any", most=None, resources={"GPU": 1})
    assert most("GPU", 0, [GPU, endless])[0] is None
    mine = NodeType(name="mine", most=4, resources={})
    assert most("GPU", 0, [mine])[0] is None, "nobody knows what machines of one's own have"


def test_types_in_words() -> None:
    assert told([HEAD, GPU]) == "head has 0 CPU; gpu has 96 CPU, 8 GPU"


def test_a_file_is_read_without_a_cluster(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_workers: 3\navailable_node_types: {gpu: {resources: {GPU: 8}}}\n")
    assert node_types(config) == [NodeType(name="gpu", most=3, resources={"GPU": 8})]
