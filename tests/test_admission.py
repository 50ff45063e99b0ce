"""Shares of a resource: what one kind of client uses is not counted against another."""

from vitalsd.admission import OWNER, Peer, Shares

TCP = Peer("tcp")


def taken(shares: Shares, peer: Peer) -> int:
    """Take until it is refused; return how often it was not."""
    count = 0
    while count < 1000 and shares.take(peer):
        count += 1
    return count


def test_share_of_the_owner_is_the_limit_over_each_kind_of_socket() -> None:
    """Clients of TCP leave the Unix socket its whole share."""
    shares = Shares(8)
    assert (taken(shares, TCP), taken(shares, OWNER), len(shares)) == (8, 8, 16)


def test_share_of_other_users_is_the_limit_together_and_half_of_it_each() -> None:
    """A third user gets nothing while two have used all of it, and the owner is not concerned."""
    shares = Shares(8)
    assert [taken(shares, Peer("other", uid)) for uid in (1002, 1003, 1004)] == [4, 4, 0]
    assert not shares.exhausted(Peer("other", 1004))
    assert taken(shares, OWNER) == 8
    shares.release(Peer("other", 1002))
    assert shares.take(Peer("other", 1004))


def test_share_of_one_is_left_to_each_kind_of_client() -> None:
    """A limit of 1 cannot be halved."""
    shares = Shares(1)
    assert [taken(shares, peer) for peer in (Peer("other", 1002), TCP, OWNER)] == [1, 1, 1]


def test_release_of_all_leaves_nothing_counted() -> None:
    """No entry stays for a user that has left."""
    shares = Shares(4)
    peers = [OWNER, TCP, Peer("other", 1002), Peer("other", None)]
    for peer in peers:
        assert shares.take(peer)
    for peer in peers:
        shares.release(peer)
    assert (len(shares), shares._used) == (0, {})
