-- Which pairs teach most? Those whose answers the judge finds furthest apart.
select round, id, chosen, rejected, round(margin, 4) as margin
from pairs
order by margin desc, id, round
limit 5
----
+-------+-----+---------------------------------+-------------------------------+--------+
| round | id  | chosen                          | rejected                      | margin |
+-------+-----+---------------------------------+-------------------------------+--------+
| 1     | q1  | blue below                      | star a blue two and two       | 0.9844 |
| 2     | q3  | below three three above         | red                           | 0.9596 |
| 2     | q0  | square a right star blue        | circle three left a           | 0.9476 |
| 1     | q22 | left                            | and                           | 0.9316 |
| 1     | q8  | two green red three three three | star star red two three right | 0.9242 |
+-------+-----+---------------------------------+-------------------------------+--------+
