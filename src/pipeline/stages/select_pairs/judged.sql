-- What all strategies end with: pairs that may be trained on, and why a prompt has none.
--
-- $margin_min: the smallest difference of worth that makes a pair.
-- $length_ratio_max: how many times as long the longer answer may be; 0 for any.
-- $pairs_max: pairs a prompt, those with the largest margins; 0 for all.
measured as (
    select
        m.prompt_id,
        m.chosen,
        m.rejected,
        c.reward as chosen_reward,
        r.reward as rejected_reward,
        c.worth - r.worth as margin,
        case
            when c.worth = r.worth then 'the answers to compare score the same'
            when c.text_digest = r.text_digest then 'the answers to compare read the same'
            when c.worth - r.worth < $margin_min then 'the rewards are closer than margin_min'
            when $length_ratio_max > 0
                and greatest(c.tokens, r.tokens) > $length_ratio_max * least(c.tokens, r.tokens)
                then 'one answer is longer than length_ratio_max allows'
        end as reason
    from matched m
    join ranked c on c.prompt_id = m.prompt_id and c.candidate = m.chosen
    join ranked r on r.prompt_id = m.prompt_id and r.candidate = m.rejected
),
numbered as (
    select
        *,
        row_number() over (
            partition by prompt_id order by reason is not null, margin desc, chosen, rejected
        ) as place
    from measured
),
judged as (
    select prompt_id, bool_or(is_faulty) as is_faulty, count(*) filter (where takes_part) as answers
    from scored
    group by prompt_id
)
select
    j.prompt_id,
    n.chosen as chosen_candidate,
    n.rejected as rejected_candidate,
    n.chosen_reward,
    n.rejected_reward,
    cast(n.margin as real) as margin,
    case when j.is_faulty then 'fault' else 'dropped' end as class,
    case
        when j.is_faulty then 'a reward is not a finite number'
        when j.answers = 0 then 'every answer was cut off at max_new_tokens'
        when n.prompt_id is null then 'fewer than two different answers are left'
        else n.reason
    end as reason
from judged j
left join numbered n
    on n.prompt_id = j.prompt_id
    and (n.place = 1 or (n.reason is null and ($pairs_max = 0 or n.place <= $pairs_max)))
order by j.prompt_id, n.place
