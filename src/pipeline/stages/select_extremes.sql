-- Which answer to each prompt is the best, and which the worst.
--
-- Ties go to the lowest candidate, for the best and for the worst alike. A prompt is set aside, with
-- the reason, when a reward is no number, when no answer is left, and when its best and its worst
-- answer score the same. (That they read the same is seen when the texts go by: only numbers are joined
-- and sorted here.)
--
-- $margin_min: the smallest difference of rewards that makes a pair.
-- $truncated: 'drop' leaves answers out that were cut off at max_new_tokens.
with scored as (
    select
        r.prompt_id,
        r.candidate,
        r.reward,
        coalesce(isnan(r.reward) or abs(r.reward) = 'infinity'::float, true) as is_faulty,
        c.prompt_id is null as takes_part
    from {rewards} r
    left join (select prompt_id, candidate from {candidates} where $truncated = 'drop' and finish <> 'stop') c
        on c.prompt_id = r.prompt_id and c.candidate = r.candidate
),
extremes as (
    select
        prompt_id,
        bool_or(is_faulty) as is_faulty,
        first_value(candidate order by reward desc, candidate) filter (where takes_part) as chosen_candidate,
        first_value(reward order by reward desc, candidate) filter (where takes_part) as chosen_reward,
        first_value(candidate order by reward, candidate) filter (where takes_part) as rejected_candidate,
        first_value(reward order by reward, candidate) filter (where takes_part) as rejected_reward
    from scored
    group by prompt_id
)
select
    prompt_id,
    chosen_candidate,
    rejected_candidate,
    chosen_reward,
    rejected_reward,
    chosen_reward - rejected_reward as margin,
    case when is_faulty then 'fault' else 'dropped' end as class,
    case
        when is_faulty then 'a reward is not a finite number'
        when chosen_candidate is null then 'every answer was cut off at max_new_tokens'
        when chosen_reward = rejected_reward then 'the best and the worst answer score the same'
        when chosen_reward - rejected_reward < $margin_min then 'the rewards are closer than margin_min'
    end as reason
from extremes
