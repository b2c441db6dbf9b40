"""What stands at a dotted key of a config."""

from raytrain.config.schema import Tree, at


def test_a_dotted_key_leads_through_mappings_and_lists() -> None:
    tree = {"MODEL": Tree(HEADS=[{"NAME": "a"}, {"NAME": "b", "RATES": [0.1, 0.2]}], WIDTH=8), "SEED": 0}
    assert at(tree, "MODEL.HEADS.1.NAME") == "b"
    assert at(tree, "MODEL.HEADS.1.RATES.0") == 0.1
    assert (at(tree, "MODEL.WIDTH"), at(tree, "SEED")) == (8, 0)
    absent = ("MODEL.HEADS.2.NAME", "MODEL.HEADS.-1.NAME", "MODEL.HEADS.NAME", "MODEL.WIDTH.0", "MODEL.X.Y", "Y")
    assert [at(tree, key) for key in absent] == [None] * len(absent)
