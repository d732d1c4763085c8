"""Claims of the Raft thesis that tests outside of ``test_thesis`` hold.

Together with the tests there this is the list of what the thesis promises and this core keeps. Where the core
departs from the thesis, docs/DIVERGENCE.md says so.
"""

from __future__ import annotations

from typing import Final

ELSEWHERE: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "3.2",
        "election safety: at most one leader in a term",
        "test_chaos.test_safety_holds_after_every_step_and_progress_returns",
    ),
    (
        "3.2",
        "state machine safety: no two entries are applied at one index",
        "test_chaos.test_safety_holds_after_every_step_and_progress_returns",
    ),
    (
        "3.3",
        "a request of an older term is refused, and the answer says why",
        "test_elections.test_a_leader_of_an_older_term_is_told_of_the_newer_one",
    ),
    ("3.4", "one vote per term", "test_elections.test_no_second_vote_in_a_term_not_even_after_a_crash"),
    (
        "3.4",
        "a candidate returns to follower when it hears the leader of its term",
        "test_elections.test_a_candidate_follows_the_leader_of_its_term",
    ),
    (
        "3.4",
        "a split vote ends with a new election",
        "test_elections.test_a_split_vote_elects_nobody_and_the_next_try_does",
    ),
    ("3.4", "timeouts are random", "test_elections.test_timeouts_are_drawn_from_t_to_2t"),
    (
        "3.5",
        "entries are sent until all have them",
        "test_replication.test_lost_entries_are_noticed_and_sent_again",
    ),
    ("3.5", "the consistency check", "test_replication.test_a_gap_is_refused"),
    (
        "3.5",
        "followers' logs are made equal to the leader's",
        "test_replication.test_figure_7_each_follower_is_brought_in_line",
    ),
    (
        "3.5",
        "a refusal that names the conflicting term saves round trips",
        "test_replication.test_hints_find_the_meeting_point_in_few_round_trips",
    ),
    (
        "3.5",
        "a message that agrees does not cut what follows",
        "test_replication.test_a_shorter_message_that_agrees_cuts_nothing",
    ),
    (
        "3.6.1",
        "votes only for logs that are at least as up to date",
        "test_elections.test_votes_go_only_to_logs_at_least_as_up_to_date",
    ),
    (
        "3.6.2",
        "entries of earlier terms are not committed by counting",
        "test_replication.test_figure_8_an_old_entry_on_a_majority_is_not_committed_by_counting",
    ),
    (
        "3.6.2",
        "for they may be overwritten",
        "test_replication.test_figure_8_d_the_old_entry_is_overwritten",
    ),
    (
        "3.8",
        "the vote is on disk before it is told",
        "test_elections.test_a_vote_leaves_only_once_it_is_durable",
    ),
    (
        "3.8",
        "the candidate's own term and vote too",
        "test_elections.test_votes_are_asked_for_only_once_the_own_vote_is_durable",
    ),
    ("3.8", "so are entries", "test_durability.test_an_acknowledgement_waits_for_the_sync"),
    (
        "3.8",
        "what was synced survives a restart",
        "test_durability.test_restart_loses_what_was_not_synced_and_nothing_else",
    ),
    (
        "3.9",
        "heartbeats come more often than elections",
        "test_parts.test_settings_out_of_range_are_refused",
    ),
    (
        "3.10",
        "the leader stops taking proposals and brings the target level, then tells it to campaign",
        "test_transfer_and_reads.test_a_transfer_waits_until_the_follower_is_level_and_refuses_proposals_meanwhile",
    ),
    (
        "3.10",
        "after an election timeout it gives up",
        "test_transfer_and_reads.test_a_transfer_that_takes_too_long_is_given_up",
    ),
    (
        "4.1",
        "a configuration is in force from its entry on, committed or not",
        "test_membership.test_a_configuration_takes_effect_when_it_is_appended",
    ),
    ("4.1", "and is undone with it", "test_membership.test_a_cut_rolls_the_configuration_back"),
    (
        "4.1",
        "one change at a time, and none before an entry of the term is committed",
        "test_membership.test_one_change_at_a_time_and_none_before_the_no_op",
    ),
    (
        "4.2.1",
        "a new server catches up without a vote",
        "test_elections.test_learners_receive_do_not_count_and_do_not_campaign",
    ),
    ("4.2.1", "then it gets one", "test_membership.test_a_replica_joins_as_learner_then_votes"),
    (
        "4.2.2",
        "a leader that is removed steps down once that is committed",
        "test_membership.test_a_leader_that_loses_its_vote_steps_down_and_hands_over",
    ),
    (
        "4.2.2",
        "a server campaigns although its own log says that it is no member",
        "test_membership.test_a_leader_removed_by_an_entry_that_only_it_has_can_still_be_elected",
    ),
    (
        "4.2.3",
        "a removed server disturbs nobody",
        "test_membership.test_a_removed_follower_is_sent_nothing_and_disturbs_nobody",
    ),
    (
        "4.2.3",
        "who hears a leader refuses to vote, and keeps its term",
        "test_elections.test_a_lease_refuses_votes_even_of_a_higher_term",
    ),
    ("4.2.3", "unless the leader asked for it", "test_elections.test_a_transfer_overrides_the_lease"),
    (
        "4.3",
        "a joint configuration commits with both majorities",
        "test_membership.test_a_joint_configuration_needs_both_majorities",
    ),
    ("4.3", "a new leader finishes it", "test_membership.test_a_new_leader_finishes_a_joint_phase"),
    (
        "5",
        "a snapshot stands for the log up to its index, configuration included",
        "test_snapshots.test_taking_over_replaces_log_and_configuration",
    ),
    (
        "5",
        "what follows a snapshot in the log is kept",
        "test_snapshots.test_a_snapshot_of_what_the_log_has_only_commits",
    ),
    (
        "5",
        "a leader sends one when it no longer has the entries",
        "test_snapshots.test_a_follower_too_far_behind_is_asked_a_snapshot_for",
    ),
    (
        "6.2",
        "a leader that hears no majority for an election timeout steps down",
        "test_elections.test_check_quorum_a_leader_cut_off_steps_down",
    ),
    (
        "6.4",
        "step 1: nothing is served before an entry of the term is committed",
        "test_transfer_and_reads.test_reads_wait_for_the_no_op",
    ),
    (
        "6.4",
        "step 3: a majority must confirm the leader after the read came",
        "test_transfer_and_reads.test_an_answer_to_an_earlier_heartbeat_confirms_nothing",
    ),
    (
        "6.4",
        "step 3: and so a deposed leader serves nothing",
        "test_transfer_and_reads.test_a_leader_cut_off_confirms_no_read",
    ),
    (
        "6.4",
        "one round confirms all reads that wait for it",
        "test_transfer_and_reads.test_reads_between_two_readies_share_a_round",
    ),
    (
        "6.4",
        "followers ask the leader for the index",
        "test_transfer_and_reads.test_a_read_on_a_follower_goes_through_the_leader",
    ),
    (
        "9.6",
        "a server that was cut off comes back without disturbing",
        "test_elections.test_pre_vote_a_replica_that_was_cut_off_does_not_disturb",
    ),
    (
        "10.2.1",
        "the leader writes while it sends",
        "test_durability.test_entries_go_to_followers_and_to_the_own_disk_in_the_same_ready",
    ),
    (
        "10.2.1",
        "and may commit before its own disk has synced",
        "test_durability.test_two_followers_commit_without_the_leaders_disk",
    ),
    (
        "10.2.1",
        "a leader's copy counts once it is durable, like any other",
        "test_durability.test_the_leaders_own_disk_is_one_of_the_majority",
    ),
    (
        "10.2.2",
        "proposals are batched",
        "test_replication.test_many_proposals_between_two_readies_are_one_append_and_one_message_each",
    ),
)
"""(section, claim, module.test)."""
