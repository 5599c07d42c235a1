-- The k answers to each training prompt. The metrics of repeated text read 2,000 prompts, the first
-- by their hashes.
with answered as (
  select prompt_id, candidate, finish, token_ids, cast(cardinality(token_ids) as double) as tokens
  from {answers} where round = $round
), some as (
  select prompt_id from answered group by prompt_id order by prompt_id limit 2000
), pieces as (
  select prompt_id, candidate, token_ids, unnest(range(1, cardinality(token_ids))) as i
  from answered where prompt_id in (select prompt_id from some)
), grams as (
  select prompt_id, candidate, array_to_string(array_slice(token_ids, i, i + 1), ' ') as two,
         case when i + 3 <= cardinality(token_ids) then array_to_string(array_slice(token_ids, i, i + 3), ' ') end as four
  from pieces
), per_prompt as (
  select cast(count(distinct two) as double) / count(two) as distinct_2 from grams group by prompt_id
), per_answer as (
  select 1 - cast(count(distinct four) as double) / count(four) as repeated_4 from grams
  group by prompt_id, candidate having count(four) > 0
), before as (
  select avg(cast(cardinality(token_ids) as double)) as tokens from {answers}
  where round = (select min(round) from {answers})
)
select 'answer_tokens' as metric, avg(tokens) as value, count(*) as n from answered
union all
select 'length_growth', avg(a.tokens) / max(b.tokens), count(*) from answered a cross join before b
union all
select 'cut_off', avg(case when finish = 'length' then 1.0 else 0.0 end), count(*) from answered
union all
select 'distinct_2', avg(distinct_2), count(*) from per_prompt
union all
select 'repeated_4', avg(repeated_4), count(*) from per_answer
