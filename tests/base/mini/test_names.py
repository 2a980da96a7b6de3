from base.mini.names import is_held_out, pool

KINDS = ("person", "place", "river", "country")


def test_parts_of_the_split_share_no_name() -> None:
    for kind in KINDS:
        train, held_out = set(pool(kind, "train")), set(pool(kind, "held_out"))
        assert train
        assert held_out
        assert not train & held_out
        assert all(map(is_held_out, held_out))
        assert not any(map(is_held_out, train))


def test_no_training_name_of_one_kind_is_held_out_for_another() -> None:
    train = {name for kind in KINDS for name in pool(kind, "train")}
    held_out = {name for kind in KINDS for name in pool(kind, "held_out")}
    assert not train & held_out
