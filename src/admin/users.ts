/** Users: the people whose access is decided. */
import { randomBytes } from 'node:crypto'
import { UniqueConstraintViolationException } from '@mikro-orm/core'
import { z } from 'zod'
import { User } from '../access/entities.ts'
import type { Call } from '../caller.ts'
import type { Clock } from '../clock.ts'
import { type Database, LockMode } from '../db/orm.ts'
import type { Reports } from '../db/replicas.ts'
import { Fault } from '../fault.ts'
import {
  type CreateUserRequest,
  type CreateUserResponse,
  type DeleteUserRequest,
  type DeleteUserResponse,
  type GetUserRequest,
  type GetUserResponse,
  type ListUsersRequest,
  type ListUsersResponse,
  type UpdateUserRequest,
  type UpdateUserResponse,
  type User as UserMessage,
  UserStatus,
} from '../gen/edgemesh/v1/admin.ts'
import { change } from './change.ts'
import { cutPage, page } from './paging.ts'
import { check, email, id, name, optionalId, role, specified } from './request.ts'

const createRequest = z.object({ id: optionalId, email, name, role })
const listRequest = z.object(page(z.tuple([id])))
const getRequest = z.object({ id: z.union([id, email], { error: 'has to be an id or an e-mail address' }) })
const updateRequest = z.object({
  id,
  name: name.optional(),
  role: role.optional(),
  status: specified(UserStatus).optional(),
})
const deleteRequest = z.object({ id })

export function userHandlers({ db, reports, clock }: { db: Database; reports: Reports; clock: Clock }) {
  return {
    async createUser(request: CreateUserRequest, call: Call): Promise<CreateUserResponse> {
      const asked = check(createRequest, request)
      const user: User = {
        id: asked.id || newUserId(),
        email: asked.email,
        name: asked.name,
        role: asked.role,
        status: 'active',
        createdAt: new Date(clock()),
      }
      call.audit.target = `user/${user.id}`
      call.audit.detail = { email: user.email, role: user.role }
      await change(db, call, async em => {
        try {
          await em.insert(User, user)
        } catch (error) {
          throw error instanceof UniqueConstraintViolationException ? userExists(user, error) : error
        }
        return { answer: undefined, keys: [`user:${user.id}`] }
      })
      return { user: userMessage(user) }
    },

    async listUsers(request: ListUsersRequest, call: Call): Promise<ListUsersResponse> {
      const { pageSize, pageToken: after } = check(listRequest, request)
      call.audit.target = 'users'
      const found = await reports.read(em =>
        em.find(User, after ? { id: { $gt: after[0] } } : {}, { orderBy: { id: 'asc' }, limit: pageSize + 1 }),
      )
      const { rows, nextPageToken } = cutPage(found, pageSize, user => [user.id])
      return { users: rows.map(userMessage), nextPageToken }
    },

    async getUser(request: GetUserRequest, call: Call): Promise<GetUserResponse> {
      const asked = check(getRequest, request)
      call.audit.target = `user/${asked.id}`
      const query = db.em().createQueryBuilder(User)
      // No id has an @ in it, so the text says which of the two it is.
      if (asked.id.includes('@')) query.where('lower(email) = lower(?)', [asked.id])
      else query.where({ id: asked.id })
      const user = await query.getSingleResult()
      if (!user) throw userNotFound(asked.id)
      return { user: userMessage(user) }
    },

    async updateUser(request: UpdateUserRequest, call: Call): Promise<UpdateUserResponse> {
      const asked = check(updateRequest, request)
      call.audit.target = `user/${asked.id}`
      const user = await change(db, call, async em => {
        const user = await em.findOne(User, asked.id, { lockMode: LockMode.PESSIMISTIC_WRITE })
        if (!user) throw userNotFound(asked.id)
        user.name = asked.name ?? user.name
        user.role = asked.role ?? user.role
        if (asked.status !== undefined) user.status = asked.status === UserStatus.ACTIVE ? 'active' : 'disabled'
        call.audit.detail = { name: user.name, role: user.role, status: user.status }
        return { answer: user, keys: [`user:${user.id}`] }
      })
      return { user: userMessage(user) }
    },

    async deleteUser(request: DeleteUserRequest, call: Call): Promise<DeleteUserResponse> {
      const asked = check(deleteRequest, request)
      call.audit.target = `user/${asked.id}`
      return change(db, call, async em => {
        const deleted = await em.nativeDelete(User, { id: asked.id })
        if (deleted === 0) throw userNotFound(asked.id)
        return { answer: {}, keys: [`user:${asked.id}`] }
      })
    },
  }
}

function newUserId(): string {
  return `user-${randomBytes(8).toString('hex')}`
}

function userMessage(user: User): UserMessage {
  return {
    id: user.id,
    email: user.email,
    name: user.name,
    role: user.role,
    status: user.status === 'active' ? UserStatus.ACTIVE : UserStatus.DISABLED,
    createdAt: user.createdAt,
  }
}

function userNotFound(id: string): Fault {
  return new Fault('NOT_FOUND', 'USER_NOT_FOUND', `there is no user ${id}`)
}

/** The database names the index that refused: the one over the id or the one over the e-mail address. */
function userExists(user: User, cause: UniqueConstraintViolationException): Fault {
  const { constraint } = cause as { constraint?: string }
  const [field, value] = constraint === 'users_email' ? ['email', user.email] : ['id', user.id]
  return new Fault('ALREADY_EXISTS', 'USER_EXISTS', `there is a user with the ${field} ${value} already`, {
    metadata: { field: field! },
    cause,
  })
}
